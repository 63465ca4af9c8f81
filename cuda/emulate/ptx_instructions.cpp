// The table of instructions: mnemonic, operands, architectures, model (Entry in ptx_program.h explains signatures). The
// comment over each group names its section of the PTX ISA and how sure the model is; ptx.h sums that up.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ptx_bits.h"
#include "ptx_convert.h"
#include "ptx_fp4.h"
#include "ptx_mma.h"
#include "ptx_program.h"
#include "ptx_wgmma.h"

namespace emu {
namespace ptx {

namespace {

// --- Registers of 32 lanes -------------------------------------------------------------------------------------------

template <int R>
struct Fragment {
    uint32_t word[32][R];
    Fragment(const Warp& warp, int first) {
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < R; ++r) word[lane][r] = warp.lane[lane]->word(first + r);
    }
    void store(const Warp& warp, int first) const {
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < R; ++r) warp.lane[lane]->set(first + r, word[lane][r]);
    }
    // A fragment of one register per lane, as a plain array.
    const uint32_t (&single() const)[32] {
        static_assert(R == 1, "one register per lane");
        return reinterpret_cast<const uint32_t(&)[32]>(word);
    }
};

template <int R>
struct RealFragment {
    float value[32][R];
    RealFragment(const Warp& warp, int first) {
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < R; ++r) value[lane][r] = warp.lane[lane]->real(first + r);
    }
    void store(const Warp& warp, int first) const {
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < R; ++r) warp.lane[lane]->set_real(first + r, value[lane][r]);
    }
};

// --- Shared-memory matrices ------------------------------------------------------------------------------------------

// Row `row` of matrix `matrix`: 16 bytes at the address that lane 8·matrix + row holds in its operand `address`.
unsigned char* matrix_row(const Warp& warp, int address, int matrix, int row, bool write) {
    const int lane = 8 * matrix + row;
    const uint32_t offset = warp.lane[lane]->word(address);
    if (offset % 16) warp.lane[lane]->fail("lane " + std::to_string(lane) + "'s row is not aligned to 16 bytes");
    void* pointer = shared_pointer(offset);
    (write ? note_write : note_read)(pointer, 16, static_cast<unsigned>(lane));
    return static_cast<unsigned char*>(pointer);
}

// Lane l holds elements (l / 4, 2 (l % 4)) and the next of each 8 × 8 matrix; transposed, (2 (l % 4), l / 4) and below.
template <int matrices, bool transposed>
void ldmatrix(const Warp& warp) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(element[row], matrix_row(warp, matrices, matrix, row, false), 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = 2 * (lane % 4);
            const uint32_t low = transposed ? element[j][i] : element[i][j];
            const uint32_t high = transposed ? element[j + 1][i] : element[i][j + 1];
            warp.lane[lane]->set(matrix, low | high << 16);
        }
    }
}

template <int matrices, bool transposed>
void stmatrix(const Warp& warp) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
        uint16_t element[8][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = 2 * (lane % 4);
            const uint32_t word = warp.lane[lane]->word(1 + matrix);
            (transposed ? element[j][i] : element[i][j]) = static_cast<uint16_t>(word);
            (transposed ? element[j + 1][i] : element[i][j + 1]) = static_cast<uint16_t>(word >> 16);
        }
        for (int row = 0; row < 8; ++row) std::memcpy(matrix_row(warp, 0, matrix, row, true), element[row], 16);
    }
}

// --- Asynchronous copies ---------------------------------------------------------------------------------------------

// Operands: shared address, global address, size; with source_size how many of those bytes to read; a policy.
template <bool source_size>
void cp_async(Frame& frame) {
    const auto bytes = static_cast<uint32_t>(frame.get(2));
    if (bytes != 4 && bytes != 8 && bytes != 16) frame.fail("cp.async copies 4, 8 or 16 bytes");
    if (bytes != 16 && std::strncmp(frame.statement->entry->mnemonic, "cp.async.cg", 11) == 0)
        frame.fail("cp.async.cg copies 16 bytes");
    const uint32_t read = source_size ? frame.word(3) : bytes;
    if (read > bytes) frame.fail("cp.async is told to read more bytes than it copies");
    const uint32_t to = frame.word(0);
    const uint64_t from = frame.get(1);
    if (to % bytes || from % bytes) frame.fail("cp.async's addresses must be aligned to its size");
    async_copy(shared_pointer(to), reinterpret_cast<const void*>(from), read, bytes - read, frame.site());
}

void cp_async_commit(Frame&) { async_commit(); }
void cp_async_wait(Frame& frame) { async_wait(frame.word(0), frame.site()); }
void cp_async_wait_all(Frame& frame) { async_wait_all(frame.site()); }

// --- Loads with cache hints ------------------------------------------------------------------------------------------

// Operands: `words` destinations, address.
template <int words>
void load(Frame& frame) {
    const uint64_t address = frame.get(words);
    if (address % (4 * words)) frame.fail("the load's address is not aligned to its size");
    const auto* pointer = reinterpret_cast<const unsigned char*>(address);
    note_read(pointer, 4 * words, lane_id());
    for (int i = 0; i < words; ++i) {
        uint32_t word;
        std::memcpy(&word, pointer + 4 * i, 4);
        frame.set(i, word);
    }
}

void create_policy(Frame& frame) { frame.set(0, 0); }  // hints change no result
void nothing(Frame&) {}

// --- Small instructions that wrappers need beside the main one -------------------------------------------------------

void reciprocal(Frame& frame) {
    const auto flushed = [](float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; };
    frame.set(0, bits_of(flushed(1.0f / flushed(frame.real(1)))));
}
void set_not_equal(Frame& frame) { frame.set(0, frame.word(1) != frame.word(2)); }
void select(Frame& frame) { frame.set(0, frame.get(3) ? frame.word(1) : frame.word(2)); }
void pack_bytes(Frame& frame) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= (frame.word(1 + i) & 0xFF) << (8 * i);
    frame.set(0, word);
}
void unpack_bytes(Frame& frame) {
    for (int i = 0; i < 4; ++i) frame.set(i, frame.word(4) >> (8 * i) & 0xFF);
}

// --- Conversions: the first source to the upper half -----------------------------------------------------------------

template <uint32_t (*code)(float), int bits>
void pair_of(Frame& frame) {
    frame.set(0, code(frame.real(1)) << bits | code(frame.real(2)));
}
template <uint32_t (*f16)(uint32_t), int bits>
void f16_pair(Frame& frame) {
    const uint32_t pair = frame.word(1), mask = (1u << bits) - 1;
    frame.set(0, f16(pair >> bits & mask) << 16 | f16(pair & mask));
}

// --- Matrix products -------------------------------------------------------------------------------------------------

template <Element element>
void mma_m16n8k16(const Warp& warp) {
    const Fragment<4> a(warp, 4);
    const Fragment<2> b(warp, 8);
    RealFragment<4> c(warp, 10);
    mma_16(element, warp.arch(), a.word, b.word, c.value);
    c.store(warp, 0);
}

void mma_m16n8k32_e4m3(const Warp& warp) {
    const Fragment<4> a(warp, 4);
    const Fragment<2> b(warp, 8);
    RealFragment<4> c(warp, 10);
    mma_e4m3(warp.arch(), a.word, b.word, c.value);
    c.store(warp, 0);
}

template <int RA, int RB>
void mma_s8_dense(const Warp& warp) {
    const Fragment<RA> a(warp, 4);
    const Fragment<RB> b(warp, 4 + RA);
    Fragment<4> c(warp, 4 + RA + RB);
    mma_s8(a.word, b.word, nullptr, c.word);
    c.store(warp, 0);
}

// Metadata and selector of a sparse instruction, as k of B per stored element of A.
int selector_of(const Warp& warp, int operand, int highest) {
    const uint32_t selector = warp.lane[0]->word(operand);
    if (selector > static_cast<uint32_t>(highest))
        warp.lane[0]->fail("the sparsity selector is at most " + std::to_string(highest));
    return static_cast<int>(selector);
}
void require_legal(const Warp& warp, bool legal) {
    if (!legal) warp.lane[0]->fail("a metadata nibble is not i0 | i1 << 2 with i0 < i1");
}

template <Element element>
void mma_sp_m16n8k32(const Warp& warp) {
    const Fragment<4> a(warp, 4), b(warp, 8);
    RealFragment<4> c(warp, 12);
    const Fragment<1> metadata(warp, 16);
    Picked picked;
    require_legal(warp, pick_16(metadata.single(), selector_of(warp, 17, 1), picked));
    mma_sp_16(element, warp.arch(), a.word, b.word, picked, c.value);
    c.store(warp, 0);
}

template <int R>
void mma_s8_sparse(const Warp& warp) {
    const Fragment<R> a(warp, 4), b(warp, 4 + R);
    Fragment<4> c(warp, 4 + 2 * R);
    const Fragment<1> metadata(warp, 8 + 2 * R);
    const int selector = selector_of(warp, 9 + 2 * R, R == 2);
    Picked picked;
    const bool legal =
        R == 2 ? pick_s8_k32(metadata.single(), selector, picked) : pick_s8_k64(metadata.single(), picked);
    require_legal(warp, legal);
    mma_s8(a.word, b.word, &picked, c.word);
    c.store(warp, 0);
}

// Operands from `first` on: scales of A, {byte, thread}, scales of B, {byte, thread}.
BlockScales block_scales(const Warp& warp, int first, ScaleType type, int count) {
    BlockScales scales{type, count, {}, {}, {}, {}};
    for (int lane = 0; lane < 32; ++lane) {
        scales.a[lane] = warp.lane[lane]->word(first);
        scales.b[lane] = warp.lane[lane]->word(first + 3);
    }
    const Frame& frame = *warp.lane[0];
    scales.a_from = {static_cast<int>(frame.word(first + 1)), static_cast<int>(frame.word(first + 2))};
    scales.b_from = {static_cast<int>(frame.word(first + 4)), static_cast<int>(frame.word(first + 5))};
    for (const ScaleSelector from : {scales.a_from, scales.b_from})
        if (from.byte < 0 || from.byte + count > 4 || from.byte % count)
            frame.fail("the byte selector is 0, or 0 or 2 with scale_vec::2X");
    if (scales.a_from.thread < 0 || scales.a_from.thread > 1) frame.fail("the thread selector of A's scales is 0 or 1");
    if (scales.b_from.thread < 0 || scales.b_from.thread > 3) frame.fail("the thread selector of B's scales is 0 to 3");
    return scales;
}

template <ScaleType type, int count>
void mma_m16n8k64_fp4(const Warp& warp) {
    const Fragment<4> a(warp, 4);
    const Fragment<2> b(warp, 8);
    RealFragment<4> c(warp, 10);
    mma_fp4(a.word, b.word, block_scales(warp, 14, type, count), c.value);
    c.store(warp, 0);
}

template <ScaleType type, int count>
void mma_sp_m16n8k128_fp4(const Warp& warp) {
    const Fragment<4> a(warp, 4), b(warp, 8);
    RealFragment<4> c(warp, 12);
    const Fragment<1> metadata(warp, 16);
    selector_of(warp, 17, 0);
    require_legal(warp, mma_sp_fp4(a.word, b.word, metadata.single(), block_scales(warp, 18, type, count), c.value));
    c.store(warp, 0);
}

// --- Barriers --------------------------------------------------------------------------------------------------------

template <bool waits>
void named_barrier(Frame& frame) {
    emu::named_barrier(frame.word(0), frame.word(1), waits, frame.site());
}

// Bulk copies that have not landed: in the lazy schedule they wait until somebody waits for their mbarrier.
struct BulkCopy {
    Mbarrier* barrier;
    void* to;
    const void* from;
    uint32_t bytes;
};
std::vector<BulkCopy> flying;

void land(const BulkCopy& copy) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    async_write_end(copy.to, copy.bytes, copy.barrier);
    copy.barrier->bytes -= static_cast<int32_t>(copy.bytes);
    copy.barrier->complete_if_done();
}

void land_copies(const Mbarrier* barrier) {
    for (size_t i = 0; i < flying.size();) {
        if (flying[i].barrier != barrier) {
            ++i;
            continue;
        }
        const BulkCopy copy = flying[i];
        flying.erase(flying.begin() + static_cast<std::ptrdiff_t>(i));
        land(copy);
    }
}

// Copies that an earlier block, or a launch that failed, left behind.
void forget_copies(const void* barrier) {
    flying.erase(std::remove_if(flying.begin(), flying.end(), [=](const BulkCopy& c) { return c.barrier == barrier; }),
                 flying.end());
}

Mbarrier& mbarrier_at(Frame& frame, int operand) {
    const uint32_t offset = frame.word(operand);
    if (offset % 8) frame.fail("an mbarrier is aligned to 8 bytes");
    void* pointer = shared_pointer(offset);
    note_atomic(pointer, 8, lane_id());
    return *static_cast<Mbarrier*>(pointer);
}

void mbarrier_init(Frame& frame) {
    const uint32_t offset = frame.word(0), count = frame.word(1);
    if (offset % 8) frame.fail("an mbarrier is aligned to 8 bytes");
    if (count == 0 || count > Mbarrier::most_arrivals) frame.fail("an mbarrier is emulated for 1 to 2047 arrivals");
    void* pointer = shared_pointer(offset);
    note_write(pointer, 8, lane_id());
    const Mbarrier barrier{count, count, 0, 0, 0};
    std::memcpy(pointer, &barrier, 8);
    forget_copies(pointer);
}

void arrive(Frame& frame, Mbarrier& barrier, uint32_t bytes) {
    if (!barrier.pending) frame.fail("more arrivals than the mbarrier expects in this phase");
    sync_release(&barrier);
    barrier.bytes += static_cast<int32_t>(bytes);
    --barrier.pending;
    barrier.complete_if_done();
}

// Operands: state (only the sink is emulated), address, bytes.
template <bool expects_bytes>
void mbarrier_arrive(Frame& frame) {
    if (frame.statement->values[0].kind != Value::sink) frame.fail("an mbarrier's state is opaque; use the sink _");
    arrive(frame, mbarrier_at(frame, 1), expects_bytes ? frame.word(2) : 0);
}

struct PhaseWait {
    const Mbarrier* barrier;
    uint32_t parity;
};

// Waits for as long as it takes: a false return would only make the kernel try again.
void mbarrier_try_wait(Frame& frame) {
    Mbarrier& barrier = mbarrier_at(frame, 1);
    land_copies(&barrier);
    PhaseWait wait{&barrier, frame.word(2) & 1};
    const auto done = [](void* state) {
        const auto* waits = static_cast<const PhaseWait*>(state);
        return waits->barrier->phase != waits->parity;
    };
    if (!done(&wait)) {
        ++barrier.waiting;
        wait_until(done, &wait, frame.site());
        --barrier.waiting;
    }
    sync_acquire(wait.barrier);
    frame.set(0, 1);
}

// Operands: shared destination, global source, bytes, mbarrier.
void bulk_copy(Frame& frame) {
    const uint32_t to = frame.word(0), bytes = frame.word(2);
    const uint64_t from = frame.get(1);
    if (to % 16 || from % 16 || bytes % 16) frame.fail("cp.async.bulk's addresses and size are multiples of 16 bytes");
    const BulkCopy copy{&mbarrier_at(frame, 3), shared_pointer(to), reinterpret_cast<const void*>(from), bytes};
    if (bytes) shared_pointer(to + bytes - 1);
    note_read(copy.from, bytes, lane_id());
    async_write_begin(copy.to, bytes, frame.site());
    if (async_is_lazy() && !copy.barrier->waiting) {
        flying.push_back(copy);
    } else {
        land(copy);
    }
}

// --- Warpgroup products ----------------------------------------------------------------------------------------------

const void* read_unit(uint32_t address) {
    const void* pointer = shared_pointer(address);
    product_reads(pointer, 16);
    return pointer;
}

// Operands 0 … count − 1 are the lanes' accumulators: to the checker, stretches of their variables.
void announce_sums(const Warp& warp, int count) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        const auto variable = [&](int i) {
            return static_cast<const char*>(warp.lane[lane]->operands[warp.statement().values[i].index].target);
        };
        for (int first = 0, end = 1; first < count; first = end++) {
            while (end < count && variable(end) == variable(end - 1) + 4) ++end;
            product_sums(variable(first), 4 * static_cast<size_t>(end - first), lane);
        }
    }
}

MatrixDescriptor descriptor_of(const Warp& warp, int operand) {
    const uint64_t bits = warp.lane[0]->get(operand);
    for (const Frame* frame : warp.lane)
        if (frame->get(operand) != bits) frame->fail("a matrix descriptor is the same in all lanes");
    const MatrixDescriptor descriptor(bits);
    if (descriptor.base_offset) warp.lane[0]->fail("a matrix descriptor's base offset is emulated as 0 only");
    return descriptor;
}

// Accumulators += a b of 16 stored k; scale_d: the operand that says whether they count, before the signs of A and B.
template <Element element, int N, int K>
void multiply(const Warp& warp, const uint16_t (&a)[16][16], const uint16_t (&b)[N][K], const Picked* picked,
              int scale_d) {
    const Frame& frame = *warp.lane[0];
    if (frame.get(scale_d + 1) != 1 || frame.get(scale_d + 2) != 1) frame.fail("wgmma's sign operands must be 1");
    announce_sums(warp, N / 2);
    Factors factors;
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) factors.set_a(row, k, element, a[row][k]);
    for (int j = 0; j < N / 8; ++j) {
        for (int column = 0; column < 8; ++column)
            for (int k = 0; k < K; ++k) factors.set_b(k, column, element, b[8 * j + column][k]);
        RealFragment<4> c(warp, 4 * j);
        if (!frame.get(scale_d)) std::memset(c.value, 0, sizeof c.value);
        accumulate(factors, 16, picked, accumulation(warp.arch(), element, 16), c.value);
        c.store(warp, 4 * j);
    }
}

// A warp's 16 rows of 16 stored k: four registers from `first` on, or the matrix that it describes.
template <bool in_registers>
void fetch_a(const Warp& warp, int first, int scale_d, uint16_t (&a)[16][16]) {
    if constexpr (in_registers) {
        unpack_a<2>(Fragment<4>(warp, first).word, a);
    } else {
        const auto row = static_cast<int>(16 * (warp_id() % 4));
        read_matrix(descriptor_of(warp, first), warp.lane[0]->get(scale_d + 3) != 0, row, 16, read_unit, a);
    }
}

// Operands: N / 2 accumulators; A as four registers or a descriptor; B's descriptor; scale-d; the signs of A and B,
// which must be 1; transposition of A (where it is in shared memory) and B.
template <Element element, int N, bool a_in_registers>
void wgmma(const Warp& warp) {
    constexpr int first = N / 2, b_at = first + (a_in_registers ? 4 : 1), scale_d = b_at + 1;
    const Frame& frame = *warp.lane[0];
    uint16_t a[16][16], b[N][16];
    fetch_a<a_in_registers>(warp, first, scale_d, a);
    read_matrix(descriptor_of(warp, b_at), frame.get(scale_d + (a_in_registers ? 3 : 4)) != 0, 0, N, read_unit, b);
    multiply<element>(warp, a, b, nullptr, scale_d);
}

// Operands: the same, with metadata and selector behind B's descriptor.
template <Element element, int N, bool a_in_registers>
void wgmma_sparse(const Warp& warp) {
    constexpr int first = N / 2, b_at = first + (a_in_registers ? 4 : 1), scale_d = b_at + 3;
    const Frame& frame = *warp.lane[0];
    const Fragment<1> metadata(warp, b_at + 1);
    Picked picked;
    require_legal(warp, pick_16(metadata.single(), selector_of(warp, b_at + 2, 1), picked));
    uint16_t a[16][16], b[N][32];
    fetch_a<a_in_registers>(warp, first, scale_d, a);
    const MatrixDescriptor of_b = descriptor_of(warp, b_at);
    if (of_b.swizzle_units == 2) frame.fail("32 k of B are not emulated with 32 bytes of swizzle");
    read_matrix(of_b, frame.get(scale_d + (a_in_registers ? 3 : 4)) != 0, 0, N, read_unit, b);
    multiply<element>(warp, a, b, &picked, scale_d);
}

void wgmma_fence(const Warp&) { product_fence(); }
void wgmma_commit(const Warp&) { product_commit(); }
void wgmma_wait(const Warp& warp) { product_wait(warp.lane[0]->word(0)); }
void proxy_fence(Frame&) { async_proxy_fence(); }
void grid_wait(Frame&) { grid_dependency_wait(); }
void meet_only(const Warp&) {}

constexpr int any = 9999;

}  // namespace

const std::vector<Entry>& instruction_table() {
    static const std::vector<Entry> table = {
        // Data movement, non-bulk asynchronous copy ("cp.async"). Sure.
        {"cp.async.ca.shared.global", "[r] [l] i", cp_async<false>, nullptr, 800, any, true},
        {"cp.async.ca.shared.global", "[r] [l] i r", cp_async<true>, nullptr, 800, any, true},
        {"cp.async.cg.shared.global", "[r] [l] i", cp_async<false>, nullptr, 800, any, true},
        {"cp.async.cg.shared.global", "[r] [l] i r", cp_async<true>, nullptr, 800, any, true},
        {"cp.async.cg.shared.global.L2::128B", "[r] [l] i", cp_async<false>, nullptr, 800, any, true},
        {"cp.async.cg.shared.global.L2::cache_hint", "[r] [l] i l", cp_async<false>, nullptr, 800, any, true},
        {"cp.async.cg.shared.global.L2::cache_hint", "[r] [l] i r l", cp_async<true>, nullptr, 800, any, true},
        {"cp.async.commit_group", "", cp_async_commit, nullptr, 800, any, true},
        {"cp.async.wait_group", "i", cp_async_wait, nullptr, 800, any, true},
        {"cp.async.wait_all", "", cp_async_wait_all, nullptr, 800, any, true},
        // Warp-level matrix load, store ("ldmatrix", "stmatrix"). Sure.
        {"ldmatrix.sync.aligned.m8n8.x1.shared.b16", "=r1 [r]", nullptr, ldmatrix<1, false>, 750, any, true},
        {"ldmatrix.sync.aligned.m8n8.x2.shared.b16", "=r2 [r]", nullptr, ldmatrix<2, false>, 750, any, true},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", "=r4 [r]", nullptr, ldmatrix<4, false>, 750, any, true},
        {"ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16", "=r1 [r]", nullptr, ldmatrix<1, true>, 750, any, true},
        {"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", "=r2 [r]", nullptr, ldmatrix<2, true>, 750, any, true},
        {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "=r4 [r]", nullptr, ldmatrix<4, true>, 750, any, true},
        {"stmatrix.sync.aligned.m8n8.x1.shared.b16", "[r] r1", nullptr, stmatrix<1, false>, 900, any, true},
        {"stmatrix.sync.aligned.m8n8.x2.shared.b16", "[r] r2", nullptr, stmatrix<2, false>, 900, any, true},
        {"stmatrix.sync.aligned.m8n8.x4.shared.b16", "[r] r4", nullptr, stmatrix<4, false>, 900, any, true},
        {"stmatrix.sync.aligned.m8n8.x1.trans.shared.b16", "[r] r1", nullptr, stmatrix<1, true>, 900, any, true},
        {"stmatrix.sync.aligned.m8n8.x2.trans.shared.b16", "[r] r2", nullptr, stmatrix<2, true>, 900, any, true},
        {"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "[r] r4", nullptr, stmatrix<4, true>, 900, any, true},
        // "ld.global.nc", "createpolicy", "prefetch": sure; hints are ignored.
        {"ld.global.nc.L1::no_allocate.b32", "=r [l]", load<1>, nullptr, 800, any, false},
        {"ld.global.nc.L1::no_allocate.v2.b32", "=r2 [l]", load<2>, nullptr, 800, any, false},
        {"ld.global.nc.L1::no_allocate.v4.b32", "=r4 [l]", load<4>, nullptr, 800, any, false},
        {"ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32", "=r4 [l] l", load<4>, nullptr, 800, any, false},
        {"createpolicy.fractional.L2::evict_first.b64", "=l", create_policy, nullptr, 800, any, false},
        {"createpolicy.fractional.L2::evict_last.b64", "=l", create_policy, nullptr, 800, any, false},
        {"prefetch.global.L2", "[l]", nothing, nullptr, 800, any, true},
        // "griddepcontrol": one grid at a time runs here; what is done before the wait matters to the checker alone.
        {"griddepcontrol.wait", "", grid_wait, nullptr, 900, any, true},
        {"griddepcontrol.launch_dependents", "", nothing, nullptr, 900, any, true},
        // "bar": sure. "mbarrier", "cp.async.bulk", "fence", "setmaxnreg": behaviour sure, copies land at once, fences
        // matter to the checker alone, a phase has at most 65535 arrivals.
        {"bar.sync", "x x", named_barrier<true>, nullptr, 0, any, true},
        {"bar.arrive", "x x", named_barrier<false>, nullptr, 0, any, true},
        {"mbarrier.init.shared::cta.b64", "[r] r", mbarrier_init, nullptr, 900, any, true},
        {"mbarrier.arrive.shared::cta.b64", "=l [r]", mbarrier_arrive<false>, nullptr, 900, any, true},
        {"mbarrier.arrive.expect_tx.shared::cta.b64", "=l [r] r", mbarrier_arrive<true>, nullptr, 900, any, true},
        {"mbarrier.try_wait.parity.shared::cta.b64", "=p [r] r", mbarrier_try_wait, nullptr, 900, any, true},
        {"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", "[r] [l] r [r]", bulk_copy, nullptr, 900,
         any, true},
        {"fence.mbarrier_init.release.cluster", "", nothing, nullptr, 900, any, true},
        {"fence.proxy.async.shared::cta", "", proxy_fence, nullptr, 900, any, true},
        {"setmaxnreg.inc.sync.aligned.u32", "i", nullptr, meet_only, 900, 909, false},
        {"setmaxnreg.dec.sync.aligned.u32", "i", nullptr, meet_only, 900, 909, false},
        // "wgmma": layouts sure, rounding from third-party probes; runs where it is issued (ptx_wgmma.h).
        {"wgmma.fence.sync.aligned", "", nullptr, wgmma_fence, 900, 909, true},
        {"wgmma.commit_group.sync.aligned", "", nullptr, wgmma_commit, 900, 909, true},
        {"wgmma.wait_group.sync.aligned", "i", nullptr, wgmma_wait, 900, 909, true},
        {"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "+f32 l l p i i i i", nullptr,
         wgmma<Element::bf16, 64, false>, 900, 909, true},
        {"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "+f32 r4 l p i i i", nullptr,
         wgmma<Element::bf16, 64, true>, 900, 909, true},
        {"wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "+f64 l l p i i i i", nullptr,
         wgmma<Element::bf16, 128, false>, 900, 909, true},
        {"wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "+f64 r4 l p i i i", nullptr,
         wgmma<Element::bf16, 128, true>, 900, 909, true},
        {"wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "+f128 l l p i i i i", nullptr,
         wgmma<Element::bf16, 256, false>, 900, 909, true},
        {"wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "+f128 r4 l p i i i", nullptr,
         wgmma<Element::bf16, 256, true>, 900, 909, true},
        // "wgmma … .sp": metadata as CUTLASS arranges it, rounding derived.
        {"wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16", "+f64 l l r i p i i i i", nullptr,
         wgmma_sparse<Element::bf16, 128, false>, 900, 909, true},
        {"wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16", "+f64 r4 l r i p i i i", nullptr,
         wgmma_sparse<Element::bf16, 128, true>, 900, 909, true},
        // "setp", "selp", "mov": sure.
        {"setp.ne.b32", "=p x x", set_not_equal, nullptr, 0, any, false},
        {"selp.b32", "=r x x p", select, nullptr, 0, any, false},
        {"mov.b32", "=r b4", pack_bytes, nullptr, 0, any, false},
        {"mov.b32", "=b4 r", unpack_bytes, nullptr, 0, any, false},
        // "cvt": sure for numbers; NaN and UE8M0 of negative values follow cuda_fp4.h and cuda_fp8.h.
        {"cvt.rn.satfinite.e4m3x2.f32", "=h f f", pair_of<e4m3_of, 8>, nullptr, 890, any, false},
        {"cvt.rn.f16x2.e4m3x2", "=r h", f16_pair<f16_of_e4m3, 8>, nullptr, 890, any, false},
        {"cvt.rn.satfinite.e2m1x2.f32", "=b f f", pair_of<e2m1_of, 4>, nullptr, 1000, any, false},
        {"cvt.rn.f16x2.e2m1x2", "=r b", f16_pair<f16_of_e2m1, 4>, nullptr, 1000, any, false},
        {"cvt.rp.satfinite.ue8m0x2.f32", "=h f f", pair_of<ue8m0_of, 8>, nullptr, 1000, any, false},
        // "rcp": correctly rounded here; a GPU's may be a unit in the last place off.
        {"rcp.approx.ftz.f32", "=f f", reciprocal, nullptr, 0, any, false},
        // "mma": fragments sure, rounding from third-party probes (ptx_mma.h); s8 exact.
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "=f4 r4 r2 f4", nullptr, mma_m16n8k16<Element::bf16>,
         800, any, false},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "=f4 r4 r2 f4", nullptr, mma_m16n8k16<Element::f16>, 800,
         any, false},
        {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "=f4 r4 r2 f4", nullptr, mma_m16n8k32_e4m3, 890, any,
         false},
        {"mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32", "=r4 r2 r1 r4", nullptr, mma_s8_dense<2, 1>, 800, any,
         false},
        {"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "=r4 r4 r2 r4", nullptr, mma_s8_dense<4, 2>, 800, any,
         false},
        // "mma.sp": metadata maps as ptx_mma.h says, derived for s8 k32; rounding derived.
        {"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32", "=f4 r4 r4 f4 r i", nullptr,
         mma_sp_m16n8k32<Element::bf16>, 800, any, false},
        {"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32", "=f4 r4 r4 f4 r i", nullptr,
         mma_sp_m16n8k32<Element::f16>, 800, any, false},
        {"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "=r4 r2 r2 r4 r i", nullptr,
         mma_s8_sparse<2>, 800, any, false},
        {"mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32", "=r4 r4 r4 r4 r i", nullptr,
         mma_s8_sparse<4>, 800, any, false},
        // "mma … block_scale": all of it as ptx_fp4.h says; unseen on hardware.
        {"mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
         "=f4 r4 r2 f4 r i2 r i2", nullptr, mma_m16n8k64_fp4<ScaleType::ue4m3, 4>, 1200, 1219, false},
        {"mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
         "=f4 r4 r2 f4 r i2 r i2", nullptr, mma_m16n8k64_fp4<ScaleType::ue8m0, 2>, 1200, 1219, false},
        {"mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
         "=f4 r4 r2 f4 r i2 r i2", nullptr, mma_m16n8k64_fp4<ScaleType::ue8m0, 2>, 1200, 1219, false},
        {"mma.sp::ordered_metadata.sync.aligned.m16n8k128.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1."
         "e2m1.f32.ue4m3",
         "=f4 r4 r4 f4 r i r i2 r i2", nullptr, mma_sp_m16n8k128_fp4<ScaleType::ue4m3, 4>, 1200, 1219, false},
        {"mma.sp::ordered_metadata.sync.aligned.m16n8k128.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1."
         "e2m1.f32.ue8m0",
         "=f4 r4 r4 f4 r i r i2 r i2", nullptr, mma_sp_m16n8k128_fp4<ScaleType::ue8m0, 2>, 1200, 1219, false},
        {"mma.sp::ordered_metadata.sync.aligned.m16n8k128.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1."
         "f32.ue8m0",
         "=f4 r4 r4 f4 r i r i2 r i2", nullptr, mma_sp_m16n8k128_fp4<ScaleType::ue8m0, 2>, 1200, 1219, false},
    };
    return table;
}

}  // namespace ptx
}  // namespace emu
