#include "topology.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace kvasir {

namespace {

constexpr const char* kNodes = "/sys/devices/system/node";

void expect(bool condition, const std::string& text) {
  if (!condition) throw std::invalid_argument("not a list of processors: '" + text + "'");
}

int parse_cpu(const std::string& text, const char** next) {
  int cpu = -1;
  const auto [stop, error] = std::from_chars(*next, text.data() + text.size(), cpu);
  expect(error == std::errc() && cpu >= 0 && cpu < CPU_SETSIZE, text);
  *next = stop;
  return cpu;
}

// The first line of a file; empty if it cannot be read.
std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

Cpus allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  Cpus cpus;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

}  // namespace

Cpus parse_cpu_list(const std::string& text) {
  Cpus cpus;
  const char* end = text.data() + text.size();
  for (const char* next = text.data(); next != end;) {
    if (!cpus.empty()) expect(*next++ == ',', text);
    const int first = parse_cpu(text, &next);
    int last = first;
    if (next != end && *next == '-') last = parse_cpu(text, &++next);
    expect(first <= last, text);
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  std::sort(cpus.begin(), cpus.end());
  return cpus;
}

std::vector<Cpus> node_cpus(const std::string& folder) {
  std::vector<Cpus> nodes;
  for (const int node : parse_cpu_list(read_line(folder + "/online"))) {
    nodes.push_back(
        parse_cpu_list(read_line(folder + "/node" + std::to_string(node) + "/cpulist")));
  }
  return nodes;
}

std::vector<Cpus> spread_threads(const std::vector<Cpus>& nodes, const Cpus& allowed,
                                 int num_threads) {
  std::vector<Cpus> usable;
  for (const Cpus& node : nodes) {
    Cpus both;
    std::set_intersection(node.begin(), node.end(), allowed.begin(), allowed.end(),
                          std::back_inserter(both));
    if (!both.empty()) usable.push_back(both);
  }
  if (usable.size() < 2) return {};
  std::vector<Cpus> threads;
  for (int thread = 0; thread < num_threads; ++thread) {
    threads.push_back(usable[thread * usable.size() / num_threads]);
  }
  return threads;
}

std::vector<Cpus> thread_cpus(int num_threads) {
  return spread_threads(node_cpus(kNodes), allowed_cpus(), num_threads);
}

void keep_to(const Cpus& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);
}

}  // namespace kvasir
