// Blending against its definition, at large sample numbers, and with weights that make no sense.
#include <cmath>
#include <numeric>

#include "data/blend.h"
#include "expect.h"

using namespace data_test;
using neox::data::blend;

namespace {

struct Blend {
    std::vector<double> weights;
    std::vector<int64_t> taken;
    std::vector<int32_t> dataset;
    std::vector<int64_t> sample;

    explicit Blend(std::vector<double> shares) : weights(std::move(shares)), taken(weights.size(), 0) {}
    void run(int64_t first, int64_t count) {
        dataset.assign(static_cast<size_t>(count), -1);
        sample.assign(static_cast<size_t>(count), -1);
        blend(weights.data(), static_cast<int64_t>(weights.size()), first, count, taken.data(), dataset.data(), sample.data());
    }
};

void equals_its_definition() {
    for (const auto& weights : std::vector<std::vector<double>>{{1}, {0.5, 0.5}, {0.1, 0.7, 0.2}, {0, 1}, {0.375, 0, 1e-9, 0.625 - 1e-9}}) {
        Blend ours(weights);
        std::vector<int64_t> taken(weights.size(), 0);
        for (int64_t i = 0; i < 2000; ++i) {
            if (i % 100 == 0) ours.run(i, 100);  // block by block: the state between calls is `taken`
            size_t best = 0;
            double largest = -INFINITY;
            for (size_t k = 0; k < weights.size(); ++k) {
                const volatile double target = weights[k] * static_cast<double>(std::max<int64_t>(i, 1));  // rounded before the difference
                if (weights[k] > 0 && target - static_cast<double>(taken[k]) > largest) largest = target - static_cast<double>(taken[k]), best = k;
            }
            EXPECT_EQ(ours.dataset[static_cast<size_t>(i % 100)], static_cast<int32_t>(best));
            EXPECT_EQ(ours.sample[static_cast<size_t>(i % 100)], taken[best]);
            ++taken[best];
        }
        EXPECT(ours.taken == taken);
    }
}

void sample_numbers_beyond_32_bits() {
    for (const int64_t bits : {31, 32, 40}) {
        for (const int64_t shift : {-1, 0, 1}) {
            const int64_t first = (int64_t{1} << bits) + shift;
            Blend ours({0.25, 0.75});
            ours.taken = {first / 4, first - first / 4};
            std::vector<int64_t> before = ours.taken;
            ours.run(first, 400);
            EXPECT(std::abs(ours.taken[0] - before[0] - 100) <= 1);
            EXPECT_EQ(ours.taken[0] + ours.taken[1], first + 400);
            for (size_t i = 0; i < 400; ++i) EXPECT_EQ(ours.sample[i], before[static_cast<size_t>(ours.dataset[i])]++);
        }
    }
}

void many_datasets() {
    for (const size_t count : {255, 256, 257, 300, 40000}) {
        Blend ours(std::vector<double>(count, 1.0 / static_cast<double>(count)));
        const int64_t samples = count > 1000 ? 64 : 2 * static_cast<int64_t>(count);
        ours.run(0, samples);
        for (int64_t i = 0; i < samples; ++i) EXPECT_EQ(ours.dataset[static_cast<size_t>(i)], static_cast<int32_t>(i % static_cast<int64_t>(count)));
    }
}

void bad_weights() {
    EXPECT_FAULT(Blend({0.5, NAN}).run(0, 1), "dataset 1");
    EXPECT_FAULT(Blend({INFINITY, 0.5}).run(0, 1), "dataset 0");
    EXPECT_FAULT(Blend({1.5, -0.5}).run(0, 1), "dataset 1");
    EXPECT_FAULT(Blend({0, 0}).run(0, 1), "no dataset has a weight above 0");
    EXPECT_FAULT(Blend({}).run(0, 0), "no dataset has a weight above 0");
    Blend none({1});
    none.run(0, 0);
    EXPECT_EQ(none.taken[0], 0);
}

}  // namespace

int main() {
    equals_its_definition();
    sample_numbers_beyond_32_bits();
    many_datasets();
    bad_weights();
    return tally.finish();
}
