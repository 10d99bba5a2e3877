// The names that a worker probably holds, judged by what was sent to it: its cache, imitated.
#pragma once

#include <span>
#include <vector>

#include "name_table.h"

namespace kvasir::router {

class AgedNames {
 public:
  AgedNames() = default;
  AgedNames(const AgedNames&) = delete;
  AgedNames& operator=(const AgedNames&) = delete;

  // `names` of one prompt, first block first, are used at `now_ms`. Whatever no longer fits into
  // `num_names_max` is appended to `gone`, least recently used first.
  void use(std::span<const Name> names, int64_t now_ms, uint32_t num_names_max,
           std::vector<Name>& gone);
  // Drops what was last used before `since_ms`.
  void drop_before(int64_t since_ms, std::vector<Name>& gone);

  uint32_t size() const { return table_.size(); }
  size_t num_bytes() const { return table_.num_bytes(); }

 private:
  struct Use {
    int64_t at_ms;
  };
  NameTable<Use> table_;
};

}  // namespace kvasir::router
