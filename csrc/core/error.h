// One exception type for the whole C++ side. The code decides which Python class it becomes
// (pygpukit_torch/errors.py), the text is what the user reads.
#pragma once

#include <stdexcept>
#include <string>

namespace pgk {

enum class ErrorCode {
  invalid_value,
  admission,
  context_destroyed,
  busy,
  out_of_memory,
  over_quota,
  device,
  forked,
  session,
  session_timeout,
  internal,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& text) : std::runtime_error(text), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

// For check_invariants(): a broken invariant is a bug of ours, never of the caller.
inline void require(bool holds, const char* invariant) {
  if (!holds) throw Error(ErrorCode::internal, std::string("invariant broken: ") + invariant);
}

}  // namespace pgk
