#include "products.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

// Copies bits: converting a signalling NaN would change it.
template <class Word>
void load_words(const Thread& thread, const int32_t* registers, Word* words, size_t count) {
    for (size_t i = 0; i < count; ++i) std::memcpy(words + i, &thread.at<uint32_t>(registers[i]), sizeof(Word));
}

}  // namespace

Products::Product* Products::issue(const Thread& thread, const int32_t* sums, size_t count, const int32_t* operand) {
    load(thread);
    std::shared_ptr<Sums> found;
    for (const auto& known : sums_) {
        const int32_t* const first = known->registers;
        const int32_t* const last = first + known->values.size();
        if (std::equal(first, last, sums, sums + count)) {
            found = known;
        } else if (std::find_first_of(first, last, sums, sums + count) != last) {
            return nullptr;
        }
    }
    if (!found) {
        found = std::make_shared<Sums>(Sums{sums, std::vector<float>(count)});
        load_words(thread, sums, found->values.data(), count);
        sums_.push_back(found);
    }
    ++found->uses;
    open_.push_back(std::make_unique<Product>(Product{found, operand, {}}));
    if (operand) load_words(thread, operand, open_.back()->operand, 4);
    return open_.back().get();
}

void Products::commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
}

void Products::load(const Thread& thread) {
    for (const auto& sums : sums_) load_words(thread, sums->registers, sums->values.data(), sums->values.size());
    for (const Group& group : groups_) {
        for (const auto& product : group) {
            if (product->operand_registers) load_words(thread, product->operand_registers, product->operand, 4);
        }
    }
}

void Products::store(const Thread& thread) const {
    for (const auto& sums : sums_) {
        for (size_t i = 0; i < sums->values.size(); ++i)
            std::memcpy(&thread.at<uint32_t>(sums->registers[i]), &sums->values[i], sizeof(float));
    }
}

void Products::retire(int pending) {
    for (; static_cast<int>(groups_.size()) > pending; groups_.pop_front()) {
        for (const auto& product : groups_.front()) --product->sums->uses;
    }
    std::erase_if(sums_, [](const auto& sums) { return sums->uses == 0; });
}

}  // namespace ptx
