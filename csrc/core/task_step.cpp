// Sessions of tasks that take turns on a thread.
#include <mutex>
#include <utility>

#include "core/scope_exit.h"
#include "core/session.h"
#include "core/thread_entries.h"

namespace pgk {

using detail::Entry;
using detail::this_process;
using detail::thread_entries;
using detail::ThreadEntries;
using detail::WayBack;

namespace {

thread_local std::uint32_t steps_under_way = 0;

}  // namespace

TaskEntry::TaskEntry(std::shared_ptr<Context> context, const void* task, const void* variables,
                     std::shared_ptr<SessionTicket> ticket)
    : context_(std::move(context)),
      task_(task),
      variables_(variables),
      ticket_(std::move(ticket)),
      thread_(thread_entries().number),
      process_(this_process()) {
  try {
    context_->begin_session(true);
  } catch (...) {
    if (ticket_) ticket_->end();
    throw;
  }
}

bool TaskEntry::close() {
  if (!open_.exchange(false)) return false;
  context_->end_session();
  if (ticket_) ticket_->end();
  return true;
}

bool TaskEntry::is_open_here() const {
  return open_.load(std::memory_order_relaxed) && thread_ == thread_entries().number &&
         process_ == this_process();
}

Step::Step(const void* variables, std::shared_ptr<Context> context) {
  ThreadEntries& own = thread_entries();
  mend_stream();
  // Known to whoever switches the thread's stream, on the way in and on the way out.
  ++steps_under_way;
  ScopeExit undo([] { --steps_under_way; });
  number_ = ++own.steps;
  own.push({.context = std::move(context), .step = number_, .variables = variables});
  undo.dismiss();
}

Step::~Step() {
  --steps_under_way;
  ThreadEntries& own = thread_entries();
  // Gone in a forked child.
  if (own.innermost_step().step < number_) return;
  while (own.pop().step != number_) continue;
}

std::uint64_t Step::number(const void* variables) {
  const Entry step = thread_entries().innermost_step();
  return step.variables == variables ? step.step : 0;
}

bool Step::is_under_way() {
  return steps_under_way > 0;
}

ThreadStreams::Saved Step::move_to(const std::shared_ptr<Context>& context) {
  ThreadEntries& own = thread_entries();
  const std::uint64_t number = own.innermost_step().step;
  while (own.top_step() != number) own.pop();
  ThreadStreams* streams = context ? context->thread_streams() : nullptr;
  const ThreadStreams::Saved was = streams != nullptr ? streams->enter(context) : 0;
  WayBack back;
  {
    const std::lock_guard lock(own.mutex);
    Entry& step = own.stack.back();
    step.context = context;
    if (streams == nullptr) {
      back = {std::exchange(step.streams, nullptr), step.before, own.innermost()};
    } else if (step.streams == nullptr) {
      step.streams = streams;
      step.before = was;
    }
    own.follow_stack();
  }
  back.take();
  return was;
}

}  // namespace pgk
