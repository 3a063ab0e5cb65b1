#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "trials.h"

namespace quire {

// A build may leave instruction sets out (QUIRE_ISAS): their tables are null.
#if defined(QUIRE_WITHOUT_avx2)
const Kernels* kernels_avx2() { return nullptr; }
#endif
#if defined(QUIRE_WITHOUT_avx512)
const Kernels* kernels_avx512() { return nullptr; }
#endif
#if defined(QUIRE_WITHOUT_avx512_bf16)
const Kernels* kernels_avx512_bf16() { return nullptr; }
#endif
#if defined(QUIRE_WITHOUT_amx)
const Kernels* kernels_amx() { return nullptr; }
#endif

namespace {

// Whether the processor has tiles with products of bf16 and of bytes, and the system lets this process use them: their
// 8 KB of state are saved only for processes that have asked (https://docs.kernel.org/arch/x86/xstate.html).
bool have_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return false;
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
#else
    return false;
#endif
}

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> tables = {kernels_portable()};
#if defined(__x86_64__)
    // These look at the operating system's support for the registers, too.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (avx2) tables.push_back(kernels_avx2());
    if (avx512) tables.push_back(kernels_avx512());
    if (bf16) tables.push_back(kernels_avx512_bf16());
    if (bf16 && __builtin_cpu_supports("avx512vbmi") && have_tiles()) tables.push_back(kernels_amx());
    tables.erase(std::remove(tables.begin(), tables.end(), nullptr), tables.end());
#endif
    return tables;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels* table : usable()) names.push_back(table->name);
    return names;
}

void set_isa(const std::string& name) {
    std::string known;
    for (const Kernels* table : usable()) {
        if (table->name == name) {
            in_use.store(table);
            forget_trials();
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument("instruction set '" + name + "' cannot be used here (usable: " + known + ")");
}

const Kernels& kernels() {
    const Kernels* table = in_use.load();
    if (!table) in_use.store(table = usable().back());
    return *table;
}

}  // namespace quire
