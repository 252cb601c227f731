// native/decode_step.cu as a library for a CPU.
#include "decode_step.cu"

extern "C" int run(const Step* step, int multiprocessors, unsigned long shared_bytes, unsigned seed) {
    return emulated::launch(multiprocessors, THREADS + 32 * PRODUCERS, shared_bytes, seed, [&] { decode_step(*step); });
}
