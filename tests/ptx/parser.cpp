#include "parser.h"

#include <algorithm>
#include <map>

#include "forms.h"
#include "operands.h"
#include "scanner.h"

namespace ptx {
namespace {

// Parses the body of a kernel, after its opening brace.
class Body {
  public:
    Body(Kernel& kernel, Scanner& scanner, const std::map<std::string, Declaration>& shared)
        : kernel_(kernel), scanner_(scanner), operands_(kernel, shared, scanner.body()) {}

    void parse() {
        for (;;) {
            if (!scanner_.more()) scanner_.fail("a kernel without an end");
            if (scanner_.next() == '{') {
                scanner_.skip();
                operands_.open_scope();
            } else if (scanner_.next() == '}') {
                scanner_.skip();
                if (!operands_.close_scope()) break;
            } else if (const std::string label = scanner_.label(); !label.empty()) {
                operands_.define_label(label);
            } else if (scanner_.next() == '.') {
                directive();
            } else {
                statement();
            }
        }
        line_ = scanner_.line();
        begin(Forms::all().find("ret")->front().second, "the end of the kernel");
        const std::string label = operands_.finish();
        if (!label.empty()) scanner_.fail("a branch to an unknown label; got=" + label);
        for (size_t i = 0; i < kernel_.code.size(); ++i)
            kernel_.code[i].operands = kernel_.operands.data() + starts_[i];
    }

  private:
    void statement() {
        line_ = scanner_.line();
        std::string text = scanner_.until(";");
        const std::string complete = text;
        const bool guarded = text[0] == '@';
        if (guarded) {
            const bool negated = text[1] == '!';
            const size_t space = text.find(' '), start = negated ? 2 : 1;
            begin(negated ? kSkipIf : kSkipUnless, complete);
            if (!operands_.match("p", {{'a', text.substr(start, space - start)}}))
                scanner_.fail("an unknown predicate; got=" + complete);
            text.erase(0, space + 1);
        }
        const size_t space = std::min(text.find(' '), text.size());
        const std::string opcode = text.substr(0, space);
        if (guarded && opcode == "bra.uni")
            scanner_.fail("bra.uni with a guard; want=all lanes branch; got=" + complete);
        const auto* const forms = Forms::all().find(opcode);
        if (!forms) scanner_.fail("an unknown opcode; got=" + opcode + "; do=add it to tests/ptx (forms.h)");
        const std::vector<Token> tokens = tokenize(text.substr(space));
        begin(nullptr, complete);
        for (const auto& [form, handler] : *forms) {
            if (!operands_.match(form, tokens)) continue;
            kernel_.code.back().run = handler;
            return;
        }
        scanner_.fail("operands that " + opcode + " does not take; got=" + complete);
    }

    void directive() {
        const std::string text = scanner_.until(";");
        const std::vector<std::string> words = split(text, ' ');
        if (words[0] == ".pragma") return;
        if (words[0] == ".shared") return operands_.place_shared(parse_declaration(text, scanner_));
        if (words[0] != ".reg" || words.size() != 3) scanner_.fail("an unknown directive; got=" + text);
        operands_.declare(words[1], words[2]);
    }

    void begin(Handler handler, const std::string& text) {
        starts_.push_back(kernel_.operands.size());
        kernel_.code.push_back({handler, nullptr, line_});
        kernel_.text.push_back(text);
    }

    Kernel& kernel_;
    Scanner& scanner_;
    Operands operands_;
    std::vector<size_t> starts_;  // of the operands of each instruction
    int line_ = 0;
};

void parse_parameters(Kernel& kernel, const std::string& text, const Scanner& scanner) {
    if (text.empty()) return;
    for (const std::string& part : split(text, ',')) {
        const Declaration found = parse_declaration(part, scanner);
        kernel.parameter_bytes = align_up(kernel.parameter_bytes, found.align);
        kernel.parameters.push_back({found.name, kernel.parameter_bytes, found.bytes});
        kernel.parameter_bytes += found.bytes;
    }
}

void parse_limits(Kernel& kernel, const std::string& text) {
    const size_t at = text.find(".maxntid ");
    if (at == std::string::npos) return;
    kernel.max_threads = 1;
    for (const std::string& part : split(text.substr(at + 9), ','))
        kernel.max_threads *= std::strtoul(part.c_str(), nullptr, 10);
}

}  // namespace

const Forms& Forms::all() {
    static const Forms forms = [] {
        Forms made;
        add_integers(made), add_floats(made), add_moves(made), add_memory(made), add_collectives(made),
            add_hopper(made);
        return made;
    }();
    return forms;
}

std::vector<std::unique_ptr<Kernel>> parse(const std::string& path, const std::string& text) {
    Scanner scanner(path, text);
    std::vector<std::unique_ptr<Kernel>> kernels;
    std::map<std::string, Declaration> shared;
    while (scanner.more()) {
        if (scanner.starts(".version") || scanner.starts(".target") || scanner.starts(".address_size")) {
            scanner.rest_of_line();
        } else if (scanner.starts(".shared") || scanner.starts(".extern .shared")) {
            const Declaration array = parse_declaration(scanner.until(";"), scanner);
            shared[array.name] = array;
        } else if (scanner.starts(".visible .entry") || scanner.starts(".entry") || scanner.starts(".weak .entry")) {
            auto kernel = std::make_unique<Kernel>();
            const std::string head = scanner.until("(");
            kernel->name = head.substr(head.rfind(' ') + 1);
            kernel->file = path;
            parse_parameters(*kernel, scanner.until(")"), scanner);
            parse_limits(*kernel, scanner.until("{"));
            Body(*kernel, scanner, shared).parse();
            kernels.push_back(std::move(kernel));
        } else {
            scanner.fail("an unknown directive; got=" + scanner.rest_of_line());
        }
    }
    return kernels;
}

}  // namespace ptx
