// Loads, stores, cp.async and reductions. Every access must be aligned to its size and lie within the parameters, the
// shared memory of the block, or one buffer (simt::memory()).
#include <array>

#include "forms.h"

namespace ptx {
namespace {

enum class Space { kParameter, kShared, kGlobal };
enum class Access : uint8_t { kRead = 0, kReadOnly = 1, kWrite = 2 };

std::string hex(uint64_t value) {
    char text[24];
    std::snprintf(text, sizeof(text), "%#lx", static_cast<unsigned long>(value));
    return text;
}

[[noreturn]] void fail_outside(Thread& t, const Instruction& i, uint64_t address, size_t bytes, const char* space) {
    t.fail(i,
           std::string("an access outside ") + space + "; got=" + std::to_string(bytes) + " bytes at " + hex(address));
}

void require_aligned(Thread& t, const Instruction& i, uint64_t address, size_t bytes) {
    if (address % bytes) t.fail(i, "a misaligned access; got=" + std::to_string(bytes) + " bytes at " + hex(address));
}

// Index of the buffer of an access. Most instructions access the same one every time.
size_t find_buffer(Thread& t, const Instruction& i, uint64_t address, size_t bytes) {
    const auto& buffers = simt::memory();
    const auto holds = [&](size_t at) {
        const auto begin = reinterpret_cast<uint64_t>(buffers[at].begin);
        return address >= begin && address + bytes <= begin + buffers[at].bytes;
    };
    const auto last = static_cast<size_t>(i.last_buffer);
    if (last < buffers.size() && holds(last)) return last;
    for (size_t at = 0; at < buffers.size(); ++at) {
        if (!holds(at)) continue;
        i.last_buffer = static_cast<int>(at);
        return at;
    }
    fail_outside(t, i, address, bytes, "every buffer");
}

// Checks an access to global memory. Memory that is read with .nc must be constant during the launch.
template <Access kAccess>
char* global(Thread& t, const Instruction& i, uint64_t address, size_t bytes) {
    const size_t buffer = find_buffer(t, i, address, bytes);
    if (kAccess != Access::kRead) {
        const simt::Memory& memory = simt::memory()[buffer];
        uint8_t* const touched =
            t.machine.touched[buffer].data() + (address - reinterpret_cast<uint64_t>(memory.begin));
        constexpr uint8_t kOther = kAccess == Access::kWrite ? 1 : 2;
        uint8_t seen = 0;
        for (size_t byte = 0; byte < bytes; ++byte) {
            seen |= touched[byte];
            touched[byte] |= static_cast<uint8_t>(kAccess);
        }
        if (seen & kOther) t.fail(i, std::string("ld.global.nc of memory that the launch writes; got=") + memory.name);
    }
    return reinterpret_cast<char*>(address);
}

char* shared(Thread& t, const Instruction& i, uint32_t address, size_t bytes) {
    require_aligned(t, i, address, bytes);
    return t.shared_at(i, address, bytes);
}

// Host address of the operand that starts at operands[at].
template <Space kSpace, Access kAccess>
char* address_of(Thread& t, const Instruction& i, int at, size_t bytes) {
    const int32_t base = i.operands[at], offset = i.operands[at + 1];
    if constexpr (kSpace == Space::kShared) {
        return shared(t, i, t.at<uint32_t>(base) + static_cast<uint32_t>(offset), bytes);
    } else {
        const uint64_t address = t.at<uint64_t>(base) + static_cast<uint64_t>(static_cast<int64_t>(offset));
        require_aligned(t, i, address, bytes);
        if constexpr (kSpace == Space::kGlobal) {
            return global<kAccess>(t, i, address, bytes);
        } else {
            if (address + bytes > t.machine.kernel.parameter_bytes)
                fail_outside(t, i, address, bytes, "the kernel's parameters");
            return t.machine.parameter_data() + address;
        }
    }
}

// Loads kCount values of type T into registers of type D, which may be wider.
template <Space kSpace, Access kAccess, class T, class D, int kCount>
const Instruction* load(Thread& t, const Instruction& i) {
    std::array<T, kCount> values;
    const char* const from = address_of<kSpace, kAccess>(t, i, kCount, sizeof(values));
    if constexpr (kSpace != Space::kParameter) simt::check::read(simt::running_thread(), from, sizeof(values));
    std::memcpy(values.data(), from, sizeof(values));
    for (int k = 0; k < kCount; ++k) t.at<D>(i.operands[k]) = static_cast<D>(values[static_cast<size_t>(k)]);
    return &i + 1;
}

template <Space kSpace, class T, int kCount>
const Instruction* store(Thread& t, const Instruction& i) {
    std::array<T, kCount> values;
    for (int k = 0; k < kCount; ++k) values[static_cast<size_t>(k)] = t.at<T>(i.operands[2 + k]);
    char* const to = address_of<kSpace, Access::kWrite>(t, i, 0, sizeof(values));
    simt::check::write(simt::running_thread(), to, sizeof(values));
    std::memcpy(to, values.data(), sizeof(values));
    return &i + 1;
}

constexpr char letter(Space space) { return space == Space::kParameter ? 'P' : space == Space::kShared ? 'S' : 'G'; }

template <Space kSpace, Access kAccess, class T, class D>
void add_loads(Forms& forms, const std::string& space, const std::string& type) {
    if constexpr (sizeof(D) >= sizeof(T)) {
        const char address = letter(kSpace), d = kind<D>();
        forms.add("ld" + space + "." + type, {d, address}, load<kSpace, kAccess, T, D, 1>);
        forms.add("ld" + space + ".v2." + type, {'{', d, d, '}', address}, load<kSpace, kAccess, T, D, 2>);
        if constexpr (sizeof(T) <= 4)
            forms.add("ld" + space + ".v4." + type, {'{', d, d, d, d, '}', address}, load<kSpace, kAccess, T, D, 4>);
    }
}

// Loads into registers of the type's size or wider, to which an integer is extended.
template <Space kSpace, Access kAccess, class T>
void add_extending_loads(Forms& forms, const std::string& space, const std::string& type) {
    using Signed = std::is_signed<T>;
    add_loads<kSpace, kAccess, T, std::conditional_t<Signed::value, int16_t, uint16_t>>(forms, space, type);
    add_loads<kSpace, kAccess, T, std::conditional_t<Signed::value, int32_t, uint32_t>>(forms, space, type);
    add_loads<kSpace, kAccess, T, std::conditional_t<Signed::value, int64_t, uint64_t>>(forms, space, type);
}

template <Space kSpace, Access kAccess = Access::kRead>
void add_loads(Forms& forms, const std::string& space) {
    add_extending_loads<kSpace, kAccess, uint8_t>(forms, space, "u8");
    add_extending_loads<kSpace, kAccess, int8_t>(forms, space, "s8");
    for (const char* type : {"u16", "b16"}) add_extending_loads<kSpace, kAccess, uint16_t>(forms, space, type);
    add_extending_loads<kSpace, kAccess, int16_t>(forms, space, "s16");
    for (const char* type : {"u32", "b32"}) add_extending_loads<kSpace, kAccess, uint32_t>(forms, space, type);
    add_extending_loads<kSpace, kAccess, int32_t>(forms, space, "s32");
    add_loads<kSpace, kAccess, uint32_t, uint32_t>(forms, space, "f32");
    for (const char* type : {"u64", "b64", "s64", "f64"})
        add_loads<kSpace, kAccess, uint64_t, uint64_t>(forms, space, type);
}

template <Space kSpace, class T>
void add_stores(Forms& forms, const std::string& space, const std::string& type, char source) {
    const char address = letter(kSpace), s = source;
    forms.add("st" + space + "." + type, {address, s}, store<kSpace, T, 1>);
    forms.add("st" + space + ".v2." + type, {address, '{', s, s, '}'}, store<kSpace, T, 2>);
    if constexpr (sizeof(T) <= 4)
        forms.add("st" + space + ".v4." + type, {address, '{', s, s, s, s, '}'}, store<kSpace, T, 4>);
}

template <Space kSpace>
void add_stores(Forms& forms, const std::string& space) {
    for (const char* type : {"u16", "b16"}) add_stores<kSpace, uint16_t>(forms, space, type, 'H');
    for (const char* type : {"u32", "b32"}) add_stores<kSpace, uint32_t>(forms, space, type, 'W');
    add_stores<kSpace, uint32_t>(forms, space, "f32", 'w');
    for (const char* type : {"u64", "b64", "f64"}) add_stores<kSpace, uint64_t>(forms, space, type, 'x');
}

// cp.async.cg.shared.global [to], [from], 16, bytes: the rest of the 16 bytes becomes zero, without a read.
const Instruction* copy_async(Thread& t, const Instruction& i) {
    const uint32_t size = t.at<uint32_t>(i.operands[4]), read = t.at<uint32_t>(i.operands[5]);
    if (size != 16 || read > size) t.fail(i, "sizes of cp.async.cg; want=16, and at most 16");
    char* const to = address_of<Space::kShared, Access::kWrite>(t, i, 0, 16);
    const uint64_t from = t.at<uint64_t>(i.operands[2]) + static_cast<uint64_t>(int64_t{i.operands[3]});
    require_aligned(t, i, from, 16);
    if (read) global<Access::kRead>(t, i, from, read);
    simt::cp_async(to, reinterpret_cast<const void*>(from), 16, static_cast<int>(read));
    return &i + 1;
}

// red.global.add.v2.f32. One OS thread runs all fibers, so that each of the two additions is atomic.
const Instruction* add_pair(Thread& t, const Instruction& i) {
    char* const at = address_of<Space::kGlobal, Access::kWrite>(t, i, 0, 8);
    simt::check::atomic(at, 8);
    float values[2];
    std::memcpy(values, at, sizeof(values));
    values[0] += t.at<float>(i.operands[2]), values[1] += t.at<float>(i.operands[3]);
    std::memcpy(at, values, sizeof(values));
    return &i + 1;
}

// The generic address of a parameter.
const Instruction* parameter_address(Thread& t, const Instruction& i) {
    t.at<uint64_t>(i.operands[0]) =
        reinterpret_cast<uint64_t>(t.machine.parameter_data()) + t.at<uint64_t>(i.operands[1]);
    return &i + 1;
}

}  // namespace

void add_memory(Forms& forms) {
    add_loads<Space::kParameter>(forms, ".param");
    add_loads<Space::kShared>(forms, ".shared");
    add_loads<Space::kGlobal>(forms, ".global");
    add_loads<Space::kGlobal, Access::kReadOnly>(forms, ".global.nc");
    add_loads<Space::kGlobal>(forms, "");
    add_stores<Space::kShared>(forms, ".shared");
    add_stores<Space::kGlobal>(forms, ".global");
    forms.add("cp.async.cg.shared.global", "SGww", copy_async);
    forms.add("red.global.add.v2.f32", "G{ww}", add_pair);
    forms.add("cvta.param.u64", "xx", parameter_address);
}

}  // namespace ptx
