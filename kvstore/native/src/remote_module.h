#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "remote.h"

namespace kvasir {

// Reads by a Python object (RemoteReads of _native.pyi); null for None. Hold the GIL.
std::shared_ptr<RemoteReader> make_remote_reader(const nanobind::object& reads);

}  // namespace kvasir
