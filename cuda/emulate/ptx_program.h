// An asm string, parsed: statements with their table entries and operands, checked once.
//
// The language is what cuda/mma.cuh needs of PTX: `.reg` declarations, braces as scopes, and instructions whose
// operands are registers (%N or declared), immediates, vectors {…} and addresses […] or […+offset]. No labels, no
// guards, no special registers. Everything else is refused with the string, and so are operands of the wrong kind or
// number, operands never used, outputs never written, "=" operands read before they are written, and memory
// instructions without a "memory" clobber.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "ptx.h"
#include "warp.h"

namespace emu {
namespace ptx {

struct Value {
    enum Kind : uint8_t { operand, local, immediate, sink } kind;
    uint8_t index;     // of the asm operand or the declared register
    int64_t constant;  // an immediate's value, or the offset added to an address
};

struct Frame;
struct Warp;

// One form of one instruction. Signature: operands separated by spaces, in order; letters as in asm constraints
// (h r l f), b a declared 8-bit register, p a predicate, i an immediate, x a 32-bit register or an immediate; "=" a
// destination (which may be the sink "_"), "+" one that is read too; a number after it: a vector of that many;
// brackets: an address (l global, r shared).
struct Entry {
    const char* mnemonic;
    const char* signature;
    void (*lane)(Frame&);       // executed by each thread for itself, or
    void (*warp)(const Warp&);  // by all 32 lanes together
    int first_arch, last_arch;  // of __CUDA_ARCH__
    bool memory;                // reads or writes memory, or orders it: needs the clobber
};
const std::vector<Entry>& instruction_table();

struct Statement {
    const Entry* entry;
    std::vector<Value> values;  // all operands, vectors flattened
};

struct Program {
    std::vector<Statement> statements;
};

// Fails (emu::fail) with the string where it is not understood.
const Program* parse(const Instruction& instruction);

// One lane inside one asm statement.
struct Frame {
    const Instruction* instruction;
    const Operand* operands;
    const Statement* statement;
    uint64_t locals[4];

    uint64_t get(int i) const {
        const Value& value = statement->values[i];
        if (value.kind == Value::operand) return operands[value.index].bits + value.constant;
        if (value.kind == Value::local) return locals[value.index] + value.constant;
        return value.constant;
    }
    uint32_t word(int i) const { return static_cast<uint32_t>(get(i)); }
    float real(int i) const {
        const uint32_t bits = word(i);
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    void set(int i, uint64_t bits) {
        const Value& value = statement->values[i];
        if (value.kind == Value::sink) return;
        if (value.kind == Value::local) {
            locals[value.index] = bits;
            return;
        }
        const Operand& operand = operands[value.index];
        operand.bits = bits;
        std::memcpy(operand.target, &bits, operand.bytes);
    }
    void set_real(int i, float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        set(i, bits);
    }
    Site site() const { return {instruction->file, instruction->line}; }
    [[noreturn]] void fail(const std::string& what) const;
};

// The 32 lanes of one warp, met at one statement.
struct Warp {
    Frame* lane[32];
    const Statement& statement() const { return *lane[0]->statement; }
    int arch() const { return lane[0]->instruction->arch; }
};

}  // namespace ptx
}  // namespace emu
