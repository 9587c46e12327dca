// Threads and MADV_DONTFORK memory stay with the process that made them.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

namespace kt {

struct ForkedProcess : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class ProcessGuard {
 public:
  bool is_owner() const { return getpid() == owner_; }

  // Throws ForkedProcess in a child of the process that made this object.
  void require_owner() const {
    if (is_owner()) return;
    throw ForkedProcess("the experts' threads and memory belong to process " +
                        std::to_string(owner_) + " and are not in its forked child " +
                        std::to_string(getpid()) +
                        "; run the model in the parent, or start the child with 'spawn'");
  }

 private:
  const pid_t owner_ = getpid();
};

}  // namespace kt
