// The table of instructions: mnemonic, operands, architectures, model. The header of ptx_program.h explains signatures,
// ptx_table.md's place is here: the comment beside each group names the section of the PTX ISA and how sure the model is.
#include <algorithm>
#include <cstring>

#include "ptx_mma.h"
#include "ptx_program.h"

namespace emu {
namespace ptx {

namespace {

// --- Registers of 32 lanes --------------------------------------------------------------------------------------------

template <int R>
struct Fragment {
    uint32_t word[32][R];
    Fragment(const Warp& warp, int first) {
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < R; ++r) word[lane][r] = warp.lane[lane]->word(first + r);
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

// --- Shared-memory matrices -------------------------------------------------------------------------------------------

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

// --- Asynchronous copies ----------------------------------------------------------------------------------------------

// Operands: shared address, global address, size, then (form 1, 3) the bytes to read of them, then (2, 3) a cache policy.
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

// --- Matrix products --------------------------------------------------------------------------------------------------

template <Element element>
void mma_m16n8k16(const Warp& warp) {
    const Fragment<4> a(warp, 4);
    const Fragment<2> b(warp, 8);
    RealFragment<4> c(warp, 10);
    mma_16(element, warp.arch(), a.word, b.word, c.value);
    c.store(warp, 0);
}

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
        // "mma": fragments sure, rounding from third-party probes (ptx_mma.h).
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "=f4 r4 r2 f4", nullptr, mma_m16n8k16<Element::bf16>,
         800, any, false},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "=f4 r4 r2 f4", nullptr, mma_m16n8k16<Element::f16>, 800,
         any, false},
    };
    return table;
}

}  // namespace ptx
}  // namespace emu
