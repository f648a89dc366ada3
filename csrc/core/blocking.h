// Around everything that may block for long: lets go of what the thread must not hold meanwhile.
// In a Python process that is the GIL, which the core does not know: the bindings set the hooks.
#pragma once

namespace pgk {

class Blocking {
 public:
  struct Hooks {
    void* (*begin)();
    void (*end)(void*);
  };
  // Before any other thread uses the core.
  static void set_hooks(Hooks hooks) { hooks_ = hooks; }

  explicit Blocking(bool wanted = true)
      : held_(!wanted || hooks_.begin == nullptr ? nullptr : hooks_.begin()) {}
  // Python ends threads that ask for the GIL after its own end, by unwinding them.
  ~Blocking() noexcept(false) {
    if (held_ != nullptr) hooks_.end(held_);
  }
  Blocking(const Blocking&) = delete;
  Blocking& operator=(const Blocking&) = delete;

 private:
  static inline Hooks hooks_{};
  void* held_;
};

}  // namespace pgk
