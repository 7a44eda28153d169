// Runs the blocks of a launch. See emulation.h.
#include "emulation.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
// The scheduler's own numbers are no part of the kernel: fibers touch them one at a time.
#define NOT_THE_KERNELS __attribute__((no_sanitize("thread")))
#else
#define NOT_THE_KERNELS
#endif

thread_local EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

Order order = Order::ascending;
long most_bytes = 99 * 1024;

namespace {

long allowed = 48 * 1024;  // what a block gets without asking
int last_error = cudaSuccess;
char* heap = nullptr;
std::vector<char> slots;
std::mt19937 dice(1);

void shuffle(std::vector<unsigned>& turn) {
    for (unsigned i = 0; i < turn.size(); ++i) turn[i] = i;
    if (order == Order::descending) std::reverse(turn.begin(), turn.end());
    if (order == Order::random) std::shuffle(turn.begin(), turn.end(), dice);
}

// A stack that runs a thread of CUDA, or the scheduler's. The sanitizers are told of every change between stacks.
struct Stack {
    ucontext_t context;
    std::unique_ptr<char[]> memory;
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake = nullptr;  // AddressSanitizer's
    void* clock = nullptr;  // ThreadSanitizer's
    bool done = false;
};

constexpr size_t kStack = 256 * 1024;
std::vector<Stack> fibers;
Stack scheduler;
unsigned running;
long progress;  // how often a meeting took place or a fiber ended
const std::function<void()>* work;

// Called on the stack that goes on, first of all.
NOT_THE_KERNELS void arrived(Stack& here, Stack& before) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(here.fake, &before.bottom, &before.size);
#endif
    (void)here, (void)before;
}

NOT_THE_KERNELS void go(Stack& from, Stack& to, bool for_ever) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake, to.bottom, to.size);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.clock, __tsan_switch_to_fiber_no_sync);  // taking turns orders nothing
#endif
    swapcontext(&from.context, &to.context);
    arrived(from, to);
}

NOT_THE_KERNELS void give_way(bool for_ever) { go(fibers[running], scheduler, for_ever); }

void release(void* place) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(place);
#endif
    (void)place;
}
void acquire(void* place) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(place);
#endif
    (void)place;
}

// A barrier of `size` fibers, of which one runs at a time.
struct Meeting {
    explicit Meeting(unsigned size) : size(size) {}
    NOT_THE_KERNELS void wait() {
        const long mine = turn;
        // Two places in turn: who is already on the way to the next meeting has ordered nothing for those still here.
        release(&place[mine & 1]);
        if (++here == size)
            here = 0, ++turn, ++progress;
        else
            while (turn == mine) give_way(false);
        acquire(&place[mine & 1]);
    }
    const unsigned size;
    unsigned here = 0;
    long turn = 0;
    char place[2] = {};
};
char ended;  // what the scheduler acquires when a block is over

// A copy of the kernel's closure: what a kernel is given by value is each thread's own.
void run_kernel() {
    const std::function<void()> own = *work;
    own();
}

NOT_THE_KERNELS void run_fiber() {
    arrived(fibers[running], scheduler);
    run_kernel();
    fibers[running].done = true, ++progress;
    release(&ended);
    give_way(true);
}

std::unique_ptr<Meeting> block_meeting;
std::vector<std::unique_ptr<Meeting>> warp_meetings;

NOT_THE_KERNELS void run_block(unsigned number, unsigned grid, unsigned block, long bytes, const std::function<void()>& kernel) {
    heap = static_cast<char*>(std::malloc(bytes));
    std::memset(heap, 0xff, bytes);
    slots.assign(8 * block, 0);
    block_meeting = std::make_unique<Meeting>(block);
    warp_meetings.clear();
    for (unsigned first = 0; first < block; first += 32)
        warp_meetings.push_back(std::make_unique<Meeting>(std::min(32u, block - first)));
    std::vector<unsigned> turn(block);
    shuffle(turn);
    blockIdx = {number}, blockDim = {block}, gridDim = {grid};
    work = &kernel;
    if (fibers.size() < block) fibers.resize(block);
#ifdef __SANITIZE_THREAD__
    scheduler.clock = __tsan_get_current_fiber();
#endif
    for (unsigned i = 0; i < block; ++i) {
        Stack& fiber = fibers[i];
        if (!fiber.memory) fiber.memory.reset(new char[kStack]);
        fiber.bottom = fiber.memory.get(), fiber.size = kStack, fiber.fake = nullptr, fiber.done = false;
#ifdef __SANITIZE_THREAD__
        fiber.clock = __tsan_create_fiber(0);
#endif
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.memory.get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (unsigned left = block; left > 0;) {
        const long before = progress;
        left = 0;
        for (const unsigned i : turn) {
            if (fibers[i].done) continue;
            running = i, threadIdx = {i};
            go(scheduler, fibers[i], false);
            left += !fibers[i].done;
        }
        if (left > 0 && progress == before) {
            std::fprintf(stderr, "emulation: %u threads wait at barriers that the others do not come to\n", left);
            std::abort();
        }
        shuffle(turn);
    }
    acquire(&ended);
#ifdef __SANITIZE_THREAD__
    for (unsigned i = 0; i < block; ++i) __tsan_destroy_fiber(fibers[i].clock);
#endif
    std::free(heap);
}

}  // namespace

double* dynamic_shared() { return reinterpret_cast<double*>(heap); }
void* slot(unsigned thread) { return slots.data() + 8 * thread; }
void meet_block() { block_meeting->wait(); }
void meet_warp() { warp_meetings[threadIdx.x / 32]->wait(); }

int error(bool forget) {
    const int said = last_error;
    if (forget) last_error = cudaSuccess;
    return said;
}

bool ask_for(long bytes) {
    if (bytes > most_bytes) return false;
    allowed = std::max(allowed, bytes);
    return true;
}

void launch(long grid, long block, long bytes, const std::function<void()>& kernel) {
    if (grid < 1 || block < 1 || block > 1024 || bytes > allowed) {
        last_error = cudaErrorInvalidValue;
        return;
    }
    std::vector<unsigned> turn(grid);
    shuffle(turn);
    for (const unsigned i : turn) run_block(i, unsigned(grid), unsigned(block), bytes, kernel);
}

}  // namespace emulated
