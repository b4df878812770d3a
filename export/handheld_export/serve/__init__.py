"""Text encoders by API: a server that speaks the Open Inference Protocol v2."""
