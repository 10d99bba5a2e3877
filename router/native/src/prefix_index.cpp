#include "prefix_index.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace kvasir::router {
namespace {

constexpr uint32_t kSweepPerName = 4;  // entries looked at for each stored name
constexpr size_t kAhead = 16;          // names whose memory is fetched ahead

uint64_t bit_of(uint32_t seat) { return uint64_t{1} << (seat % 64); }

bool test(const std::vector<uint64_t>& bits, uint32_t seat) {
  return seat / 64 < bits.size() && (bits[seat / 64] & bit_of(seat));
}

}  // namespace

uint32_t PrefixIndex::take_seat() {
  if (seats_free_.empty() && seats_.size() == kSeatsMax) {
    while (!seats_sweeping_.empty() || !seats_given_up_.empty()) sweep(kNone);
    if (seats_free_.empty()) throw std::length_error("too many workers");
  }
  uint32_t seat;
  if (seats_free_.empty()) {
    seat = static_cast<uint32_t>(seats_.size());
    seats_.emplace_back();
    taken_.resize(seats_.size() / 64 + 1);
    few_bits_.resize(taken_.size());
  } else {
    seat = seats_free_.back();
    seats_free_.pop_back();
  }
  seats_[seat] = {.taken = true, .num_blocks = 0};
  taken_[seat / 64] |= bit_of(seat);
  return seat;
}

void PrefixIndex::give_up_seat(uint32_t seat) {
  seats_[seat] = {};
  taken_[seat / 64] &= ~bit_of(seat);
  seats_given_up_.push_back(seat);
}

void PrefixIndex::store(uint32_t seat, std::span<const Name> names) {
  for (const Name& name : names) {
    uint32_t index = table_.find(name);
    if (index == kNone) {
      index = table_.insert(name);
    } else {
      table_.make_newest(index);
    }
    seats_[seat].num_blocks += add(table_[index].payload, seat);
    if (table_.size() > blocks_max_) erase(table_.oldest());
    sweep(kSweepPerName);
  }
}

void PrefixIndex::remove(uint32_t seat, std::span<const Name> names) {
  for (const Name& name : names) {
    const uint32_t index = table_.find(name);
    if (index == kNone || !discard(table_[index].payload, seat)) continue;
    --seats_[seat].num_blocks;
    if (is_empty(table_[index].payload)) erase(index);
  }
}

bool PrefixIndex::add(Holders& holders, uint32_t seat) {
  if (holders.wide == kNone) {
    const auto end = holders.few.begin() + holders.num_few;
    if (std::find(holders.few.begin(), end, seat) != end) return false;
    if (holders.num_few < Holders::kFew) {
      holders.few[holders.num_few++] = static_cast<uint16_t>(seat);
      return true;
    }
    widen(holders);
  }
  Bits& bits = wide_[holders.wide];
  if (test(bits, seat)) return false;
  if (bits.size() <= seat / 64) bits.resize(seat / 64 + 1);
  bits[seat / 64] |= bit_of(seat);
  return true;
}

bool PrefixIndex::discard(Holders& holders, uint32_t seat) {
  if (holders.wide != kNone) {
    Bits& bits = wide_[holders.wide];
    if (!test(bits, seat)) return false;
    bits[seat / 64] &= ~bit_of(seat);
    return true;
  }
  const auto end = holders.few.begin() + holders.num_few;
  const auto found = std::find(holders.few.begin(), end, seat);
  if (found == end) return false;
  *found = *(end - 1);
  --holders.num_few;
  return true;
}

bool PrefixIndex::is_empty(const Holders& holders) const {
  if (holders.wide == kNone) return holders.num_few == 0;
  return std::ranges::all_of(wide_[holders.wide], [](uint64_t word) { return word == 0; });
}

void PrefixIndex::widen(Holders& holders) {
  if (wide_free_.empty()) {
    wide_free_.push_back(static_cast<uint32_t>(wide_.size()));
    wide_.emplace_back();
  }
  holders.wide = wide_free_.back();
  wide_free_.pop_back();
  Bits& bits = wide_[holders.wide];
  bits.assign(taken_.size(), 0);
  for (size_t i = 0; i < holders.num_few; ++i) bits[holders.few[i] / 64] |= bit_of(holders.few[i]);
  holders.num_few = 0;
}

void PrefixIndex::erase(uint32_t index) {
  Holders& holders = table_[index].payload;
  const auto forget = [this](uint32_t seat) { seats_[seat].num_blocks -= seats_[seat].taken; };
  if (holders.wide == kNone) {
    for (size_t i = 0; i < holders.num_few; ++i) forget(holders.few[i]);
  } else {
    const Bits& bits = wide_[holders.wide];
    for (size_t word = 0; word < bits.size(); ++word) {
      for (uint64_t left = bits[word]; left; left &= left - 1) {
        forget(static_cast<uint32_t>(64 * word + std::countr_zero(left)));
      }
    }
    wide_free_.push_back(holders.wide);
  }
  table_.erase(index);
}

// Looks at the next entries for holders that have given up their seat.
void PrefixIndex::sweep(uint32_t num_entries) {
  if (seats_sweeping_.empty()) {
    if (seats_given_up_.empty()) return;
    seats_sweeping_.swap(seats_given_up_);
    sweep_at_ = 0;
  }
  for (; num_entries > 0 && sweep_at_ < table_.num_indices(); --num_entries, ++sweep_at_) {
    if (table_.is_used(sweep_at_)) drop_given_up(sweep_at_);
  }
  if (sweep_at_ == table_.num_indices()) {
    seats_free_.insert(seats_free_.end(), seats_sweeping_.begin(), seats_sweeping_.end());
    seats_sweeping_.clear();
  }
}

void PrefixIndex::drop_given_up(uint32_t index) {
  Holders& holders = table_[index].payload;
  if (holders.wide != kNone) {
    Bits& bits = wide_[holders.wide];
    for (size_t word = 0; word < bits.size(); ++word) bits[word] &= taken_[word];
  } else {
    for (size_t i = holders.num_few; i-- > 0;) {
      if (!seats_[holders.few[i]].taken) discard(holders, holders.few[i]);
    }
  }
  if (is_empty(holders)) erase(index);
}

void PrefixIndex::begin_match(std::span<const uint32_t> wanted, uint32_t num_longest) {
  wanted_.clear();
  for (const uint32_t seat : wanted) wanted_.push_back({seat, 0});
  ended_.clear();
  alive_ = taken_;
  walked_ = 0;
  num_longest_ = num_longest;
}

bool PrefixIndex::walk(std::span<const Name> names) {
  std::array<uint32_t, kAhead> found;
  while (!names.empty()) {
    const auto batch = names.first(std::min(kAhead, names.size()));
    names = names.subspan(batch.size());
    for (const Name& name : batch) table_.prefetch_slot(name);
    for (size_t i = 0; i < batch.size(); ++i) {
      found[i] = table_.find_likely(batch[i]);
      if (found[i] != kNone) table_.prefetch_entry(found[i]);
    }
    for (size_t i = 0; i < batch.size(); ++i) {
      uint32_t index = found[i];
      if (index != kNone && table_[index].name != batch[i]) index = table_.find(batch[i]);
      if (!intersect(index == kNone ? Holders{} : table_[index].payload)) return false;
      ++walked_;
    }
  }
  return true;
}

void PrefixIndex::end_match(std::vector<uint32_t>& runs, std::vector<Run>& longest) {
  intersect(Holders{});
  runs.clear();
  for (const Run& run : wanted_) runs.push_back(run.num_blocks);
  const size_t kept = std::min<size_t>(num_longest_, ended_.size());
  longest.assign(ended_.rbegin(), ended_.rbegin() + static_cast<ptrdiff_t>(kept));
}

// Leaves alive who also holds the next name; false: nobody.
bool PrefixIndex::intersect(const Holders& holders) {
  for (Run& run : wanted_) {
    if (test(alive_, run.seat)) run.num_blocks = walked_;
  }
  const bool few = holders.wide == kNone;
  for (size_t i = 0; i < holders.num_few; ++i) {
    few_bits_[holders.few[i] / 64] |= bit_of(holders.few[i]);
  }
  const Bits& bits = few ? few_bits_ : wide_[holders.wide];
  uint64_t any = 0;
  num_noted_ = 0;
  for (size_t word = 0; word < alive_.size(); ++word) {
    const uint64_t held = word < bits.size() ? bits[word] : 0;
    if (const uint64_t ended = alive_[word] & ~held) note_ended(ended, word);
    any |= alive_[word] &= held;
  }
  for (size_t i = 0; i < holders.num_few; ++i) few_bits_[holders.few[i] / 64] = 0;
  return any != 0;
}

// The seats in `bits` hold exactly the names walked so far.
void PrefixIndex::note_ended(uint64_t bits, size_t word) {
  for (; bits && walked_ > 0 && num_noted_ < num_longest_; bits &= bits - 1, ++num_noted_) {
    ended_.push_back({static_cast<uint32_t>(64 * word + std::countr_zero(bits)), walked_});
  }
}

size_t PrefixIndex::num_bytes() const {
  size_t total = table_.num_bytes() + wide_.capacity() * sizeof(Bits);
  for (const Bits& bits : wide_) total += bits.capacity() * sizeof(uint64_t);
  return total;
}

}  // namespace kvasir::router
