// Many threads on one small device, for the sanitizers: allocations in shared and own contexts,
// reclaim between them, contexts that come and go with live blocks, sessions that queue up,
// statistics; and a memory pool too small for them.
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/address_table.h"
#include "core/manager.h"
#include "core/memory_pool.h"
#include "core/scope_exit.h"
#include "core/session.h"
#include "device/host_device.h"
#include "device/waiters.h"

namespace {

using namespace pgk;

// A thread's stream, as torch keeps it.
thread_local std::int64_t thread_stream = 0;

struct FakeStreams final : ThreadStreams {
  StreamId current() override { return static_cast<StreamId>(thread_stream); }
  std::shared_ptr<Context> context() override { return nullptr; }
  Saved enter(const std::shared_ptr<Context>& context) override {
    return std::exchange(thread_stream, static_cast<std::int64_t>(context->stream()));
  }
  void leave(Saved saved, const std::shared_ptr<Context>& /*outer*/) override {
    thread_stream = saved;
  }
};

constexpr int kThreads = 4;
constexpr int kSteps = 1000;
constexpr int kPoolSteps = 1000;
constexpr int kWaits = 100;
constexpr int kSessions = 2;  // of the shared context, at a time

struct Block {
  void* address;
  std::size_t bytes;
  unsigned char mark;

  void write() const {
    std::memset(address, mark, 1);
    std::memset(static_cast<char*>(address) + bytes - 1, mark, 1);
  }
  // Also while its page moves: that is one step for whoever reads, which the sanitizer cannot know.
  [[gnu::no_sanitize("thread")]] bool intact() const {
    const auto* data = static_cast<const unsigned char*>(address);
    return data[0] == mark && data[bytes - 1] == mark;
  }
};

std::atomic<int> refusals{0};
std::atomic<int> inside{0};
std::atomic<int> waits{0};

void fail(const char* text) {
  std::fprintf(stderr, "%s\n", text);
  std::abort();
}

void work(Manager& manager, const std::shared_ptr<Context>& shared, int index) {
  std::mt19937 random(static_cast<unsigned>(index));
  const auto below = [&](std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(random);
  };
  std::vector<Block> blocks;
  // Of both tiers that give way, and one with a base that others lend.
  const Tier tier = index % 2 == 0 ? Tier::best_effort : Tier::burstable;
  const std::size_t base = index == 1 ? 6 * MiB : 0;
  const auto spec = [&](int step) {
    return ContextSpec{"own-" + std::to_string(index) + "-" + std::to_string(step), 16 * MiB, base,
                       tier};
  };
  auto own = manager.create_context(spec(-1));
  const auto attempt = [](const auto& action) {
    try {
      action();
    } catch (const Error& error) {
      const bool expected =
          error.code() == ErrorCode::out_of_memory || error.code() == ErrorCode::busy ||
          error.code() == ErrorCode::admission || error.code() == ErrorCode::invalid_value;
      if (!expected) throw;
      ++refusals;
    }
  };
  for (int step = 0; step < kSteps; ++step) {
    const std::size_t what = below(100);
    if (what < 45 && !blocks.empty()) {
      std::swap(blocks[below(blocks.size())], blocks.back());
      if (!blocks.back().intact()) fail("memory was handed out twice");
      Context* owner = AddressTable::owner_of(blocks.back().address);
      if (owner == nullptr) fail("a live block has no owner");
      if (below(4) == 0) {
        owner->free_after(blocks.back().address, std::array{shared->stream()});
      } else {
        owner->free(blocks.back().address);
      }
      blocks.pop_back();
    } else if (what < 97) {
      const std::int64_t outside = thread_stream;
      const auto ticket = shared->queue_up(tickets_of_thread());
      if (ticket->is_waiting()) ++waits;
      if (ticket->is_waiting() && below(8) == 0) continue;
      while (ticket->is_waiting()) ticket->wait_for(std::chrono::milliseconds(10));
      Session outer(shared);
      Session session(below(2) == 0 ? own : shared);
      bool is_in = false;
      attempt([&] {
        outer.enter(ticket);
        is_in = true;
      });
      if (!is_in) continue;
      if (++inside > kSessions) fail("more sessions were let in than the limit");
      // Within it there is nothing to wait for.
      const auto again = shared->queue_up(tickets_of_thread());
      if (again->is_waiting()) fail("who was in had to queue up");
      is_in = false;
      attempt([&] {
        session.enter(again);
        is_in = true;
      });
      if (!is_in) {
        --inside;
        outer.exit();
        continue;
      }
      if (thread_stream != static_cast<std::int64_t>(current_context()->stream())) {
        fail("a session's stream is not current");
      }
      const std::size_t bytes = 1 + below(below(10) == 0 ? 3 * MiB : 20 * KiB);
      try {
        const StreamId stream = below(3) == 0 ? shared->stream() : current_context()->stream();
        const Block block{current_context()->allocate(bytes, stream), bytes,
                          static_cast<unsigned char>(index + 1)};
        block.write();
        blocks.push_back(block);
      } catch (const Error& error) {
        if (error.code() != ErrorCode::out_of_memory) throw;
        ++refusals;
      }
      const bool is_out_of_order = below(2) == 0;
      (is_out_of_order ? outer : session).exit();
      --inside;
      (is_out_of_order ? session : outer).exit();
      if (thread_stream != outside) fail("the thread did not get its stream back");
    } else if (what < 98) {
      // With its live blocks; they are freed later, by address.
      manager.destroy_context(*own);
      own.reset();
      while (!own) {
        attempt([&] { own = manager.create_context(spec(step)); });
      }
    } else if (what < 99) {
      attempt([&] { manager.resize_context(*own, 16 * MiB, base); });
      attempt([&] { manager.evict_context(*own); });
      attempt([&] { manager.restore_context(below(2) == 0 ? *own : *shared); });
    } else if (below(4) == 0) {
      manager.trim();
    } else {
      manager.device_usage();
      manager.totals();
      manager.check_invariants();
    }
  }
  for (const Block& block : blocks) AddressTable::owner_of(block.address)->free(block.address);
  manager.destroy_context(*own);
}

std::atomic<int> over_quota{0};

// Blocks come and go between the threads' pins, which end without the pool's lock.
void pool_work(MemoryPool& pool, int index) {
  std::mt19937 random(static_cast<unsigned>(index));
  const auto below = [&](std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(random);
  };
  for (int step = 0; step < kPoolSteps; ++step) {
    try {
      const std::size_t bytes = 1 + below(below(4) == 0 ? 3 * MiB : 20 * KiB);
      const MemoryPool::Id id = pool.allocate(bytes);
      ScopeExit free_it([&] { pool.free(id); });
      auto pin = pool.pin(id);
      const Block block{reinterpret_cast<void*>(pin->address()), bytes,
                        static_cast<unsigned char>(index + 1)};
      block.write();
      pin.reset();
      if (below(3) == 0) pool.evict(id);
      pin = pool.pin(id);
      const Block again{reinterpret_cast<void*>(pin->address()), bytes, block.mark};
      if (!again.intact()) fail("a block of the pool lost its contents");
      if (below(2) == 0) pin.reset();  // else it is freed while it is pinned
    } catch (const Error& error) {
      if (error.code() != ErrorCode::over_quota) throw;
      ++over_quota;
    }
    if (step % 100 == 0) pool.check_invariants();
  }
}

}  // namespace

int main() {
  FakeStreams streams;
  auto manager = Manager::make(std::make_shared<HostDevice>(48 * MiB), &streams, 64 * MiB,
                               std::chrono::milliseconds(2));
  auto shared =
      manager->create_context({"shared", 24 * MiB, 0, Tier::burstable, {}, false, kSessions});
  auto pool = MemoryPool::make(4 * MiB, true, std::make_shared<HostDevice>(12 * MiB));
  std::vector<std::thread> threads;
  for (int index = 0; index < kThreads; ++index) {
    threads.emplace_back([&, index] { pool_work(*pool, index); });
  }
  for (int index = 0; index < kThreads; ++index) {
    threads.emplace_back([&, index] { work(*manager, shared, index); });
  }
  std::atomic<int> waited{0};
  for (int wait = 0; wait < kWaits; ++wait) {
    Waiters::wait_for([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++waited;
    });
  }
  for (auto& thread : threads) thread.join();
  while (waited < kWaits) std::this_thread::yield();
  pool->check_invariants();
  if (pool->stats().used != 0) fail("blocks of the pool were lost");
  if (pool->stats().eviction_count == 0 || over_quota == 0) fail("the pool was never full");
  const Totals totals = manager->totals();
  if (totals.counters.evictions == 0 || totals.counters.restores == 0) fail("nobody gave way");
  manager->check_invariants();
  if (shared->used_bytes() != 0) fail("blocks were lost");
  if (manager->device_usage().contexts.size() != 1) fail("an orphan was not collected");
  if (waits == 0) fail("nobody had to wait for his turn");
  SessionTicket::List all;
  for (int slot = 0; slot < kSessions; ++slot) all.push_back(shared->queue_up({}));
  if (all.back()->is_waiting()) fail("a slot was lost");
  if (refusals == 0) fail("the device was never full: the test tests too little");
  std::printf("done, %d refusals, %llu evictions, %llu restores\n", refusals.load(),
              static_cast<unsigned long long>(totals.counters.evictions),
              static_cast<unsigned long long>(totals.counters.restores));
}
