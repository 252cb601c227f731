// Batches for the CUDA driver. The same calls as in vattn/driver/cuda.py, in the same order.
#include "native.h"

// What cuda.h says on every 64-bit Linux: CUdeviceptr and CUmemGenericAllocationHandle are unsigned long long.
static_assert(sizeof(unsigned long long) == sizeof(uint64_t) && sizeof(std::size_t) == 8 && sizeof(void *) == 8);

int64_t vattn_cuda_create(const vattn_cuda *cuda, const void *properties, uint64_t size, int64_t count,
                          uint64_t *handles, vattn_failure *failure) {
    for (int64_t index = 0; index < count; ++index) {
        unsigned long long handle = 0;
        if (int code = cuda->create(&handle, size, properties, 0)) {
            *failure = {"cuMemCreate", code};
            return index;
        }
        handles[index] = handle;
    }
    return count;
}

int64_t vattn_cuda_map(const vattn_cuda *cuda, const void *access, uint64_t size, int64_t count,
                       const uint64_t *addresses, const uint64_t *handles, vattn_failure *failure) {
    for (int64_t index = 0; index < count; ++index) {
        if (int code = cuda->map(addresses[index], size, 0, handles[index], 0)) {
            *failure = {"cuMemMap", code};
            return 2 * index;
        }
        // One call a page: a wide one over all of them takes as long, and would leave them all without access.
        if (int code = cuda->set_access(addresses[index], size, access, 1)) {
            *failure = {"cuMemSetAccess", code};
            return 2 * index + 1;
        }
    }
    return 2 * count;
}
