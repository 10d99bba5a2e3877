// Who holds which block: names to sets of holders, asked for leading runs.
//
// A holder is a small number, its seat. Invariants: never more than `blocks_max` names, the oldest
// go first; a seat that was given up is handed out again only when no entry names it any more.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "name_table.h"

namespace kvasir::router {

inline constexpr uint32_t kSeatsMax = 8192;

struct Run {
  uint32_t seat;
  uint32_t num_blocks;
};

class PrefixIndex {
 public:
  explicit PrefixIndex(uint32_t blocks_max) : blocks_max_(blocks_max) {}
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // Throws std::length_error when all seats are taken.
  uint32_t take_seat();
  void give_up_seat(uint32_t seat);
  void store(uint32_t seat, std::span<const Name> names);
  void remove(uint32_t seat, std::span<const Name> names);

  // A match is one walk over a prompt's names, given piece by piece: begin, walk until it returns
  // false (nobody holds more) or the names end, then ask for the results: leading blocks that each
  // of `wanted` holds, and the `num_longest` longest runs of all seats, longest first.
  void begin_match(std::span<const uint32_t> wanted, uint32_t num_longest);
  bool walk(std::span<const Name> names);
  void end_match(std::vector<uint32_t>& runs, std::vector<Run>& longest);

  uint32_t size() const { return table_.size(); }
  uint32_t num_blocks(uint32_t seat) const { return seats_[seat].num_blocks; }
  bool is_taken(uint32_t seat) const { return seat < seats_.size() && seats_[seat].taken; }
  size_t num_bytes() const;

 private:
  using Bits = std::vector<uint64_t>;

  // Few holders by number, many as a bit set: a system prompt may be held by all workers.
  struct Holders {
    static constexpr size_t kFew = 4;
    uint32_t wide = kNone;  // index into wide_
    uint16_t num_few = 0;
    std::array<uint16_t, kFew> few{};
  };
  struct Seat {
    bool taken = false;
    uint32_t num_blocks = 0;
  };
  using Table = NameTable<Holders>;

  bool add(Holders& holders, uint32_t seat);
  bool discard(Holders& holders, uint32_t seat);
  bool is_empty(const Holders& holders) const;
  void widen(Holders& holders);
  void erase(uint32_t index);
  void sweep(uint32_t num_entries);
  void drop_given_up(uint32_t index);
  bool intersect(const Holders& holders);
  void note_ended(uint64_t bits, size_t word);

  uint32_t blocks_max_;
  Table table_;
  std::vector<Bits> wide_;
  std::vector<uint32_t> wide_free_;
  std::vector<Seat> seats_;
  Bits taken_;  // seats that are taken, as bits
  std::vector<uint32_t> seats_free_;
  std::vector<uint32_t> seats_sweeping_;  // given up before the current sweep began
  std::vector<uint32_t> seats_given_up_;  // since then
  uint32_t sweep_at_ = 0;
  // Of the match, kept to allocate nothing per call.
  uint32_t walked_ = 0;
  uint32_t num_longest_ = 0;
  uint32_t num_noted_ = 0;  // of the runs that ended at the present name
  Bits alive_;              // seats that hold all names walked
  Bits few_bits_;
  std::vector<Run> wanted_;  // runs so far
  std::vector<Run> ended_;   // shortest first; of equal ones as many as can matter
};

}  // namespace kvasir::router
