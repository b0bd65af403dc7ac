// Splits PTX text into statements.
#pragma once

#include <cctype>
#include <cstring>
#include <string>
#include <vector>

#include "simt.h"

namespace ptx {

class Scanner {
  public:
    Scanner(const std::string& path, const std::string& text) : path_(path), text_(text) {}

    // Skips space and comments. False at the end of the text.
    bool more() {
        while (at_ < text_.size()) {
            if (text_.compare(at_, 2, "//") == 0) {
                while (at_ < text_.size() && text_[at_] != '\n') ++at_;
            } else if (std::isspace(static_cast<unsigned char>(text_[at_]))) {
                line_ += text_[at_++] == '\n';
            } else {
                return true;
            }
        }
        return false;
    }
    bool starts(const char* with) const { return text_.compare(at_, std::strlen(with), with) == 0; }
    char next() const { return text_[at_]; }
    std::string rest_of_line() {
        const size_t start = at_;
        while (at_ < text_.size() && text_[at_] != '\n') ++at_;
        return text_.substr(start, at_ - start);
    }
    void skip() { line_ += text_[at_++] == '\n'; }

    // The text before the first of `stops`, which is skipped. Space is collapsed.
    std::string until(const char* stops) {
        std::string found;
        while (more() && !std::strchr(stops, text_[at_])) {
            while (at_ < text_.size() && !std::isspace(static_cast<unsigned char>(text_[at_])) &&
                   !std::strchr(stops, text_[at_]))
                found += text_[at_++];
            if (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) found += ' ';
        }
        if (at_ == text_.size()) fail(std::string("the text ends before one of ") + stops);
        skip();
        while (!found.empty() && found.back() == ' ') found.pop_back();
        return found;
    }

    // Skips a label and returns its name, or an empty string if there is none here.
    std::string label() {
        size_t end = at_;
        while (end < text_.size() && is_name(text_[end])) ++end;
        if (end == at_ || end == text_.size() || text_[end] != ':') return "";
        if (text_.compare(end, 2, "::") == 0) return "";  // within an opcode: .shared::cta
        const std::string name = text_.substr(at_, end - at_);
        at_ = end + 1;
        return name;
    }

    // The rest of the body that starts here, without the closing brace; does not skip it.
    std::string body() const {
        int depth = 1;
        size_t end = at_;
        for (; end < text_.size(); ++end) {
            depth += (text_[end] == '{') - (text_[end] == '}');
            if (!depth) break;
        }
        return text_.substr(at_, end - at_);
    }

    int line() const { return line_; }
    [[noreturn]] void fail(const std::string& what) const {
        simt::fail(what + "; where=" + path_ + ":" + std::to_string(line_));
    }

    static bool is_name(char c) {
        return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
    }

  private:
    std::string path_;
    const std::string& text_;
    size_t at_ = 0;
    int line_ = 1;
};

inline std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts(1);
    for (const char c : text) {
        if (c == separator) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    for (std::string& part : parts) {
        while (!part.empty() && part.front() == ' ') part.erase(0, 1);
        while (!part.empty() && part.back() == ' ') part.pop_back();
    }
    return parts;
}

}  // namespace ptx
