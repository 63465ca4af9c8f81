#include "ptx_program.h"

#include <cctype>

#include "warp.h"

namespace emu {
namespace ptx {

void Frame::fail(const std::string& what) const {
    emu::fail_at(site(), "%s, in asm \"%s\"", what.c_str(), instruction->text);
}

namespace {

struct Constraint {
    char letter;
    bool reads, writes;
    bool used = false, written = false;
};

struct Local {
    std::string name;
    char letter;
    bool written = false;
};

// What a value of the signature must be.
struct Slot {
    char letter;  // as Entry::signature explains
    bool reads, writes, address, vector;
    int count;
};

std::vector<Slot> slots_of(const char* signature) {
    std::vector<Slot> slots;
    for (const char* at = signature; *at; ++at) {
        if (*at == ' ') continue;
        Slot slot{0, *at != '=', *at == '=' || *at == '+', *at == '[', false, 1};
        if (slot.writes || slot.address) ++at;
        slot.letter = *at;
        if (std::isdigit(at[1])) {
            slot.vector = true;
            slot.count = 0;
            while (std::isdigit(at[1])) slot.count = 10 * slot.count + (*++at - '0');
        }
        if (slot.address) ++at;  // its closing bracket
        slots.push_back(slot);
    }
    return slots;
}

char letter_of_type(const std::string& type) {
    if (type == "pred") return 'p';
    if (type == "b8") return 'b';
    if (type == "b16" || type == "u16" || type == "s16") return 'h';
    if (type == "b32" || type == "u32" || type == "s32") return 'r';
    if (type == "b64" || type == "u64" || type == "s64") return 'l';
    return type == "f32" ? 'f' : 0;
}

class Parser {
  public:
    explicit Parser(const Instruction& instruction) : instruction_(instruction) {
        read_constraints();
        read_tokens();
    }

    const Program* parse() {
        auto* program = new Program;  // lives as long as the module
        int depth = 0;
        while (at_ < tokens_.size()) {
            const std::string token = next();
            if (token == ";") continue;
            if (token == "{") {
                ++depth;
            } else if (token == "}") {
                if (--depth < 0) fail("a closing brace too many");
            } else if (token == "@") {
                fail("guarded instructions are not emulated");
            } else if (token == ".reg") {
                declare();
            } else {
                program->statements.push_back(statement(token));
            }
        }
        if (depth) fail("an unclosed brace");
        for (size_t i = 0; i < constraints_.size(); ++i) {
            if (!constraints_[i].used) fail("operand %" + std::to_string(i) + " is never used");
            if (constraints_[i].writes && !constraints_[i].written)
                fail("output %" + std::to_string(i) + " is never written");
        }
        return program;
    }

  private:
    struct Argument {
        std::vector<std::string> words;
        std::vector<int64_t> offsets;
        bool address = false, vector = false;
    };

    [[noreturn]] void fail(const std::string& what) const { Frame{&instruction_, nullptr, nullptr, {}}.fail(what); }

    void read_constraints() {
        int part = 0;
        std::string word;
        for (const char* at = instruction_.constraints;; ++at) {
            if (*at && *at != ',' && *at != '|') {
                word += *at;
                continue;
            }
            if (part == 2) {
                memory_ = memory_ || word == "memory";
            } else if (!word.empty()) {
                const bool output = part == 0;
                constraints_.push_back({word.back(), !output || word[0] == '+', output});
            }
            word.clear();
            if (!*at) break;
            part += *at == '|';
        }
    }

    void read_tokens() {
        const std::string text = instruction_.text;
        const auto part_of_word = [](char c) { return std::isalnum(c) || std::strchr("_.:%$", c); };
        for (size_t i = 0; i < text.size();) {
            if (std::isspace(text[i])) {
                ++i;
            } else if (text.compare(i, 2, "//") == 0) {
                i = std::min(text.find('\n', i), text.size());
            } else if (text[i] != '\0' && part_of_word(text[i])) {
                const size_t start = i;
                while (i < text.size() && part_of_word(text[i])) ++i;
                tokens_.push_back(text.substr(start, i - start));
            } else {
                tokens_.push_back(text.substr(i++, 1));
            }
        }
    }

    std::string peek() const { return at_ < tokens_.size() ? tokens_[at_] : std::string(); }
    std::string next() {
        if (at_ == tokens_.size()) fail("an unfinished statement");
        return tokens_[at_++];
    }
    bool take(const char* token) {
        if (peek() != token) return false;
        ++at_;
        return true;
    }
    void expect(const char* token) {
        if (!take(token)) fail(std::string("expected '") + token + "' and not '" + peek() + "'");
    }

    void declare() {
        std::string type = next();
        const char letter = letter_of_type(type.substr(type[0] == '.'));
        if (!letter) fail("registers of type " + type + " are not emulated");
        do locals_.push_back({next(), letter});
        while (take(","));
        if (locals_.size() > sizeof(Frame::locals) / sizeof(uint64_t)) fail("too many declared registers");
        expect(";");
    }

    int64_t number(std::string word) const {
        const bool negative = word[0] == '-';
        char* end = nullptr;
        const char* digits = word.c_str() + negative;
        const auto value = static_cast<int64_t>(std::strtoull(digits, &end, 0));
        if (!std::isdigit(*digits) || *end) fail("'" + word + "' is neither an operand, nor declared, nor a number");
        return negative ? -value : value;
    }

    std::string word() {
        if (take("-")) return "-" + next();
        return next();
    }

    Argument argument() {
        Argument result;
        result.address = take("[");
        result.vector = !result.address && take("{");
        do {
            result.words.push_back(word());
            result.offsets.push_back(result.address && take("+") ? number(word()) : 0);
        } while (result.vector && take(","));
        if (result.address) expect("]");
        if (result.vector) expect("}");
        return result;
    }

    Statement statement(const std::string& mnemonic) {
        std::vector<Argument> arguments;
        if (!peek().empty() && peek() != ";") {
            do arguments.push_back(argument());
            while (take(","));
        }
        if (!peek().empty()) expect(";");
        std::string forms;
        for (const Entry& entry : instruction_table()) {
            if (mnemonic != entry.mnemonic) continue;
            const std::vector<Slot> slots = slots_of(entry.signature);
            if (same_shape(slots, arguments)) return bind(entry, slots, arguments);
            forms += forms.empty() ? "" : "' or '";
            forms += entry.signature;
        }
        if (forms.empty()) fail("no model of instruction '" + mnemonic + "'");
        fail("operands of '" + mnemonic + "' do not have the form '" + forms + "'");
    }

    static bool same_shape(const std::vector<Slot>& slots, const std::vector<Argument>& arguments) {
        if (slots.size() != arguments.size()) return false;
        for (size_t i = 0; i < slots.size(); ++i)
            if (slots[i].address != arguments[i].address || slots[i].vector != arguments[i].vector ||
                slots[i].count != static_cast<int>(arguments[i].words.size()))
                return false;
        return true;
    }

    Statement bind(const Entry& entry, const std::vector<Slot>& slots, const std::vector<Argument>& arguments) {
        if (instruction_.arch < entry.first_arch || instruction_.arch > entry.last_arch)
            fail("the instruction does not exist on sm_" + std::to_string(instruction_.arch / 10));
        if (entry.memory && !memory_) fail("the instruction touches memory, but there is no \"memory\" clobber");
        Statement result{&entry, {}};
        for (int pass = 0; pass < 2; ++pass)  // sources before destinations
            for (size_t i = 0; i < slots.size(); ++i)
                for (size_t j = 0; j < arguments[i].words.size(); ++j)
                    if (pass == 0) {
                        result.values.push_back(value(slots[i], arguments[i].words[j], arguments[i].offsets[j]));
                    } else if (slots[i].writes) {
                        mark_written(arguments[i].words[j]);
                    }
        return result;
    }

    Value value(const Slot& slot, const std::string& word, int64_t offset) {
        if (word[0] == '%') return operand(slot, word, offset);
        if (word == "_" && slot.writes) return {Value::sink, 0, 0};
        for (size_t i = 0; i < locals_.size(); ++i) {
            if (locals_[i].name != word) continue;
            const char letter = slot.letter == 'x' ? 'r' : slot.letter;
            if (locals_[i].letter != letter) fail("'" + word + "' has the wrong type");
            if (slot.reads && !locals_[i].written) fail("'" + word + "' is read before it is written");
            return {Value::local, static_cast<uint8_t>(i), offset};
        }
        const int64_t constant = number(word);
        if (slot.letter != 'i' && slot.letter != 'x') fail("'" + word + "' stands where a register belongs");
        return {Value::immediate, 0, constant};
    }

    Value operand(const Slot& slot, const std::string& word, int64_t offset) {
        const int64_t index = number(word.substr(1));
        if (index >= static_cast<int64_t>(constraints_.size())) fail("there is no operand " + word);
        Constraint& constraint = constraints_[index];
        const char letter = constraint.letter;
        const bool right = slot.letter == 'x'   ? letter == 'r' || letter == 'n'
                           : slot.letter == 'i' ? letter == 'n'
                                                : letter == slot.letter;
        if (!right) fail(word + " is \"" + letter + "\" where \"" + slot.letter + "\" belongs");
        if (slot.writes && !constraint.writes) fail("input " + word + " is written");
        if (slot.reads && !constraint.reads && !constraint.written)
            fail("output " + word + " is read before it is written");
        constraint.used = true;
        return {Value::operand, static_cast<uint8_t>(index), offset};
    }

    void mark_written(const std::string& word) {
        if (word[0] == '%') constraints_[number(word.substr(1))].written = true;
        for (Local& local : locals_) local.written = local.written || local.name == word;
    }

    const Instruction& instruction_;
    std::vector<Constraint> constraints_;
    std::vector<Local> locals_;
    std::vector<std::string> tokens_;
    size_t at_ = 0;
    bool memory_ = false;
};

// Runs once, when the last lane has arrived.
void run_warp(void* const lanes[32]) {
    Warp warp;
    for (int i = 0; i < 32; ++i) {
        warp.lane[i] = static_cast<Frame*>(lanes[i]);
        if (warp.lane[i]->statement != warp.lane[0]->statement)
            warp.lane[0]->fail("lane " + std::to_string(i) + " is at another instruction (" +
                               warp.lane[i]->instruction->file + ":" + std::to_string(warp.lane[i]->instruction->line) +
                               ")");
    }
    warp.statement().entry->warp(warp);
}

}  // namespace

const Program* parse(const Instruction& instruction) { return Parser(instruction).parse(); }

void Instruction::operator()(std::initializer_list<Operand> operands) {
    if (!program) program = parse(*this);
    Frame frame{this, operands.begin(), nullptr, {}};
    for (const Statement& statement : program->statements) {
        frame.statement = &statement;
        if (statement.entry->lane) {
            statement.entry->lane(frame);
        } else {
            emu::warp_collective(~0u, &frame, run_warp, frame.site());
        }
    }
}

}  // namespace ptx
}  // namespace emu
