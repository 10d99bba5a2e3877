#include "aged_names.h"

#include <ranges>

namespace kvasir::router {

void AgedNames::use(std::span<const Name> names, int64_t now_ms, uint32_t num_names_max,
                    std::vector<Name>& gone) {
  // The first block becomes the most recent: a worker evicts a chain from its end.
  for (const Name& name : names | std::views::reverse) {
    uint32_t index = table_.find(name);
    if (index == kNone) {
      index = table_.insert(name);
    } else {
      table_.make_newest(index);
    }
    table_[index].payload.at_ms = now_ms;
  }
  while (table_.size() > num_names_max) {
    gone.push_back(table_[table_.oldest()].name);
    table_.erase(table_.oldest());
  }
}

void AgedNames::drop_before(int64_t since_ms, std::vector<Name>& gone) {
  while (table_.size() > 0 && table_[table_.oldest()].payload.at_ms < since_ms) {
    gone.push_back(table_[table_.oldest()].name);
    table_.erase(table_.oldest());
  }
}

}  // namespace kvasir::router
