// The fuzzer's seeds, each as it is, cut short and with bytes changed: what fuzz_rdp.cpp checks, without libFuzzer.
#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz_rdp.cpp"

namespace {

using Bytes = std::vector<std::uint8_t>;

void test(const Bytes &input) { LLVMFuzzerTestOneInput(input.data(), input.size()); }

void test_variants(const Bytes &seed) {
    test(seed);
    for (std::size_t size = 0; size < seed.size(); size += 1 + size / 4) {
        test(Bytes(seed.begin(), seed.begin() + static_cast<std::ptrdiff_t>(size)));
    }
    for (std::size_t at = 0; at < seed.size(); at += 1 + at / 16) {
        for (const int change : {0x01, 0x80, 0xff}) {
            Bytes changed = seed;
            changed[at] = static_cast<std::uint8_t>(changed[at] ^ change);
            test(changed);
        }
    }
}

}  // namespace

int main() {
    int seeds = 0;
    const std::filesystem::path here = std::filesystem::path(__FILE__).parent_path();
    for (const auto &entry : std::filesystem::directory_iterator(here / "corpus")) {
        std::ifstream file(entry.path(), std::ios::binary);
        test_variants(Bytes(std::istreambuf_iterator<char>(file), {}));
        ++seeds;
    }
    require(seeds >= 10, "the seeds were found");
}
