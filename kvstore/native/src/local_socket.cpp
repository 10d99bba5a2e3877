#include "local_socket.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string_view>
#include <system_error>

namespace kvasir {
namespace {

constexpr std::string_view kSuffix = ".kv.sock";

std::string file_name(const Name& uid) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string name;
  for (const uint8_t byte : uid) {
    name += kDigits[byte >> 4];
    name += kDigits[byte & 15];
  }
  return name.append(kSuffix);
}

Fd open_folder(const std::string& folder) {
  return Fd(open(folder.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
}

// By way of the folder's descriptor: the path of the folder may be longer than an address takes.
sockaddr_un address_in(const Fd& folder, const std::string& file) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = "/proc/self/fd/" + std::to_string(folder.get()) + "/" + file;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  return address;
}

Fd make_socket() { return Fd(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)); }

int connect_in(const Fd& folder, const std::string& file, const Fd& fd) {
  const sockaddr_un address = address_in(folder, file);
  return connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
}

// 0: there is no such file.
uint64_t inode_of(const Fd& folder, const std::string& file) {
  struct stat status{};
  const bool is_there = fstatat(folder.get(), file.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0;
  return is_there ? status.st_ino : 0;
}

void sweep(const std::string& path, const Fd& folder) {
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(path.c_str()), closedir);
  if (!entries) return;
  while (const dirent* entry = readdir(entries.get())) {
    const std::string file = entry->d_name;
    if (!file.ends_with(kSuffix)) continue;
    const Fd probe = make_socket();
    if (connect_in(folder, file, probe) != 0 && errno == ECONNREFUSED) {
      unlinkat(folder.get(), file.c_str(), 0);
    }
  }
}

template <typename Call>
Code repeat(const Stream& stream, short events, Deadline deadline, const Signal* ended, Call call) {
  for (;;) {
    const ssize_t count = call();
    if (count > 0) return Code::kOk;
    if (count == 0 || (errno != EAGAIN && errno != EINTR)) return Code::kUnreachable;
    const Code code = stream.wait(events, deadline, ended);
    if (code != Code::kOk) return code;
  }
}

// A number, and one descriptor that goes with it.
struct DescriptorMessage {
  DescriptorMessage() {
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
  }
  uint32_t number = 0;
  iovec part{.iov_base = &number, .iov_len = sizeof number};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
};

}  // namespace

LocalListener listen_local(const std::string& folder_path, const Name& uid, int backlog) {
  Fd folder = open_folder(folder_path);
  if (folder) sweep(folder_path, folder);
  const std::string file = file_name(uid);
  const std::string bound = file + ".new";  // nobody connects, or sweeps, before it listens
  Fd fd = make_socket();
  if (folder && fd) {
    unlinkat(folder.get(), bound.c_str(), 0);
    const sockaddr_un address = address_in(folder, bound);
    const auto* generic = reinterpret_cast<const sockaddr*>(&address);
    const bool is_listening =
        bind(fd.get(), generic, sizeof address) == 0 && listen(fd.get(), backlog) == 0;
    const uint64_t inode = inode_of(folder, bound);
    if (is_listening && renameat(folder.get(), bound.c_str(), folder.get(), file.c_str()) == 0) {
      return {.fd = std::move(fd), .folder = std::move(folder), .file = file, .inode = inode};
    }
  }
  throw std::system_error(errno, std::generic_category(), "cannot listen in " + folder_path);
}

void stop_listening(LocalListener& listener) {
  if (listener.fd && inode_of(listener.folder, listener.file) == listener.inode) {
    unlinkat(listener.folder.get(), listener.file.c_str(), 0);
  }
  listener = {};
}

bool connect_local(const std::string& folder_path, const Name& uid, Stream& stream) {
  const Fd folder = open_folder(folder_path);
  Fd fd = make_socket();
  if (!folder || !fd || connect_in(folder, file_name(uid), fd) != 0) return false;
  stream = Stream(std::move(fd));
  return true;
}

Code send_shared_memory(const Stream& stream, int fd, uint32_t num_blocks, Deadline deadline,
                        const Signal* ended) {
  DescriptorMessage message;
  message.number = num_blocks;
  cmsghdr* control = CMSG_FIRSTHDR(&message.header);
  control->cmsg_level = SOL_SOCKET;
  control->cmsg_type = SCM_RIGHTS;
  control->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(control), &fd, sizeof fd);
  return repeat(stream, POLLOUT, deadline, ended,
                [&] { return sendmsg(stream.fd(), &message.header, MSG_NOSIGNAL); });
}

Code recv_shared_memory(const Stream& stream, SharedMemory& memory, Deadline deadline,
                        const Signal* ended) {
  DescriptorMessage message;
  const Code code = repeat(stream, POLLIN, deadline, ended,
                           [&] { return recvmsg(stream.fd(), &message.header, MSG_CMSG_CLOEXEC); });
  if (code != Code::kOk) return code;
  const cmsghdr* control = CMSG_FIRSTHDR(&message.header);
  if (control == nullptr || control->cmsg_type != SCM_RIGHTS) return Code::kRefused;
  int received = -1;
  std::memcpy(&received, CMSG_DATA(control), sizeof received);
  memory = {.fd = Fd(received), .num_blocks = message.number};
  return Code::kOk;
}

}  // namespace kvasir
