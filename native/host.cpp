// Batches for the host driver: pages of a memfd. The same calls as in vattn/driver/host.py, in the same order.
#include "native.h"

#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>

int32_t vattn_abi() { return 1; }

int64_t vattn_host_create(int fd, uint64_t size, int64_t count, const uint64_t *handles, vattn_failure *failure) {
    for (int64_t index = 0; index < count; ++index) {
        int code;
        do {
            code = posix_fallocate(fd, static_cast<off_t>(handles[index] - 1), static_cast<off_t>(size));
        } while (code == EINTR);
        if (code) {
            *failure = {"fallocate", code};
            return index;
        }
    }
    return count;
}

int64_t vattn_host_map(int fd, uint64_t size, int64_t count, const uint64_t *addresses, const uint64_t *handles,
                       vattn_failure *failure) {
    for (int64_t index = 0; index < count; ++index) {
        void *address = reinterpret_cast<void *>(addresses[index]);
        auto offset = static_cast<off_t>(handles[index] - 1);
        if (mmap(address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED) {
            *failure = {"mmap", errno};
            return 2 * index;
        }
        // Before it can be written: a forked child must not get this mapping.
        if (madvise(address, size, MADV_DONTFORK)) {
            *failure = {"madvise", errno};
            return 2 * index;
        }
        if (mprotect(address, size, PROT_READ | PROT_WRITE)) {
            *failure = {"mprotect", errno};
            return 2 * index + 1;
        }
    }
    return 2 * count;
}
