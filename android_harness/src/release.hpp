// A release on a device: whether a bundle is the one that its manifest means.
#pragma once

#include <string>

namespace hh {

// Follows the hashes from release.json to the bundle's manifest and from there to every file.
// Throws Error with code "bundle" or "hash". Whose the release is, its signature says, which the
// app's update has checked.
void check_release(const std::string& release_json, const std::string& variant,
                   const std::string& bundle);

}  // namespace hh
