#pragma once

#include <nanobind/nanobind.h>

namespace kvasir {

void bind_codecs(nanobind::module_& m);

}  // namespace kvasir
