#include "cpu/pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// A thread looks so often for more work before it goes to sleep: about 20 us, what waking it would take.
constexpr int kLooks = 500;

void rest() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#else
  std::this_thread::yield();
#endif
}

class pool {
 public:
  void run(int64_t count, const std::function<void(int64_t)> &turn) {
    std::unique_lock<std::mutex> only(callers_, std::try_to_lock);
    if (!only.owns_lock()) return turn(0);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(count - 1);
      turn_ = &turn;
      begun_ = 1;
      count_ = count;
      posted_.fetch_add(1);
    }
    awake_.notify_all();
    turn(0);
    std::unique_lock<std::mutex> lock(mutex_);
    turn_ = nullptr;  // who has not begun need not
    ended_.wait(lock, [&] { return running_ == 0; });
  }

 private:
  void grow(int64_t threads) {
    try {
      for (; threads_ < threads; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error &) {
      // the system has no more: those that run do the same work
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (!turn_ || begun_ == count_) {
        const int64_t seen = posted_.load();
        lock.unlock();
        for (int look = 0; look < kLooks && posted_.load() == seen; ++look) rest();
        lock.lock();
        awake_.wait(lock, [&] { return turn_ && begun_ < count_; });
      }
      const std::function<void(int64_t)> &turn = *turn_;
      const int64_t number = begun_++;
      ++running_;
      lock.unlock();
      turn(number);
      lock.lock();
      if (--running_ == 0) ended_.notify_one();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable awake_, ended_;
  std::atomic<int64_t> posted_{0};
  const std::function<void(int64_t)> *turn_ = nullptr;
  int64_t count_ = 0, begun_ = 0, running_ = 0, threads_ = 0;
};

// Never destroyed: its threads wait until the process ends. A forked child has none of them, and perhaps locks that
// nobody will open: it begins with a pool of its own.
std::atomic<pool *> current{nullptr};

pool &the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    current = new pool;
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { current = new pool; });
#endif
  });
  return *current;
}

}  // namespace

void run_on_threads(int64_t count, const std::function<void(int64_t)> &turn) {
  if (count <= 1) return turn(0);
  the_pool().run(count, turn);
}
