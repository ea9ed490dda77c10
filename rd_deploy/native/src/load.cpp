// A .rdp file on disk, mapped read-only: its weights are used where the page cache has them, by all processes at once.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"
#include "network.h"

namespace rd {
namespace {

struct Descriptor {
    // Not blocking: opening a pipe must not wait for a writer.
    explicit Descriptor(const char *path) : number(::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
    ~Descriptor() {
        if (number >= 0) ::close(number);
    }
    Descriptor(const Descriptor &) = delete;
    Descriptor &operator=(const Descriptor &) = delete;

    const int number;
};

[[noreturn]] void fail(const char *path, int error) {
    throw Error(error == ENOMEM ? RD_ERROR_MEMORY : RD_ERROR_FILE, printable(path) + ": " + std::strerror(error));
}

std::shared_ptr<const void> map_file(const char *path, std::size_t *bytes) {
    const Descriptor file(path);
    struct stat status{};
    if (file.number < 0 || ::fstat(file.number, &status) != 0) fail(path, errno);
    if (!S_ISREG(status.st_mode)) throw Error(RD_ERROR_FILE, printable(path) + " is not a file");
    if (status.st_size <= 0) throw Error(RD_ERROR_FORMAT, printable(path) + " is empty; export it again");
    const auto size = static_cast<std::size_t>(status.st_size);
    void *data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.number, 0);
    if (data == MAP_FAILED) fail(path, errno);
    std::shared_ptr<const void> mapped(data, [size](const void *p) { ::munmap(const_cast<void *>(p), size); });
    ::madvise(data, size, MADV_WILLNEED);  // advice only: whatever it returns, the file is read
    *bytes = size;
    return mapped;
}

}  // namespace

std::shared_ptr<const Network> load_network(const char *path) {
    std::size_t bytes = 0;
    const std::shared_ptr<const void> mapped = map_file(path, &bytes);
    try {
        return parse_network(mapped.get(), bytes, mapped);
    } catch (const Error &error) {
        throw Error(error.status, printable(path) + ": " + error.what());
    }
}

}  // namespace rd
