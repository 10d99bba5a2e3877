// Which processors the threads of a pool keep to, on machines of several memory nodes.
#pragma once

#include <string>
#include <vector>

namespace kvasir {

using Cpus = std::vector<int>;  // in rising order

// "0-3,8" as the kernel writes lists; throws std::invalid_argument for anything else.
Cpus parse_cpu_list(const std::string& text);

// The processors of each memory node, read from the folder where the kernel lists nodes; empty if
// it cannot be read.
std::vector<Cpus> node_cpus(const std::string& folder);

// The processors of each thread: neighbours share a node, nodes are filled evenly. Only `allowed`
// processors count; empty where they lie on fewer than two nodes.
std::vector<Cpus> spread_threads(const std::vector<Cpus>& nodes, const Cpus& allowed,
                                 int num_threads);

// The same for this process on this machine. The first thread is a pool's caller, not bound by it.
std::vector<Cpus> thread_cpus(int num_threads);

// Keeps the calling thread to these processors. A refusal is no error: it only costs speed.
void keep_to(const Cpus& cpus);

}  // namespace kvasir
