"""The light commands, one file each; imported when they are run."""
