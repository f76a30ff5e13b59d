// Threads that wait for work: a decoding step has a hundred products, and to start a thread takes as long as one.
#ifndef LOWRA_CPU_POOL_H
#define LOWRA_CPU_POOL_H

#include <cstdint>
#include <functional>

// Calls turn(0) here and turn(1) to turn(count - 1) on other threads; returns when all that began have ended. What the
// turns do together must be handed out among them as they go: a turn may begin late or never, where its core is busy
// with something else, where the pool is serving another caller, or where the system has no more threads.
void run_on_threads(int64_t count, const std::function<void(int64_t)> &turn);

#endif
