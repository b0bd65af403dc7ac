// Blending against its definition, at large sample numbers, and with invalid weights.
#include <cmath>
#include <numeric>
#include <random>

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
        blend(weights.data(), static_cast<int64_t>(weights.size()), first, count, taken.data(), dataset.data(),
              sample.data());
    }
};

void equals_its_definition() {
    for (const auto& weights :
         std::vector<std::vector<double>>{{1}, {0.5, 0.5}, {0.1, 0.7, 0.2}, {0, 1}, {0.375, 0, 1e-9, 0.625 - 1e-9}}) {
        Blend ours(weights);
        std::vector<int64_t> taken(weights.size(), 0);
        for (int64_t i = 0; i < 2000; ++i) {
            if (i % 100 == 0) ours.run(i, 100);  // block by block: the state between calls is `taken`
            size_t best = 0;
            double largest = -INFINITY;
            for (size_t k = 0; k < weights.size(); ++k) {
                // rounded before the difference
                const volatile double target = weights[k] * static_cast<double>(std::max<int64_t>(i, 1));
                if (weights[k] > 0 && target - static_cast<double>(taken[k]) > largest)
                    largest = target - static_cast<double>(taken[k]), best = k;
            }
            EXPECT_EQ(ours.dataset[static_cast<size_t>(i % 100)], static_cast<int32_t>(best));
            EXPECT_EQ(ours.sample[static_cast<size_t>(i % 100)], taken[best]);
            ++taken[best];
        }
        EXPECT(ours.taken == taken);
    }
}

// The definition, sample by sample.
void run_plain(Blend& blend, int64_t first, int64_t count) {
    blend.dataset.assign(static_cast<size_t>(count), -1);
    blend.sample.assign(static_cast<size_t>(count), -1);
    for (int64_t i = 0; i < count; ++i) {
        size_t best = 0;
        double largest = -INFINITY;
        for (size_t k = 0; k < blend.weights.size(); ++k) {
            const volatile double target = blend.weights[k] * static_cast<double>(std::max<int64_t>(first + i, 1));
            const double lag = target - static_cast<double>(blend.taken[k]);
            if (blend.weights[k] > 0 && lag > largest) largest = lag, best = k;
        }
        blend.dataset[static_cast<size_t>(i)] = static_cast<int32_t>(best);
        blend.sample[static_cast<size_t>(i)] = blend.taken[best]++;
    }
}

void expect_equal(Blend ours, int64_t first, int64_t count) {
    Blend plain = ours;
    ours.run(first, count);
    run_plain(plain, first, count);
    EXPECT(ours.dataset == plain.dataset);
    EXPECT(ours.sample == plain.sample);
    EXPECT(ours.taken == plain.taken);
}

std::vector<double> shares(std::vector<double> weights) {
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (double& weight : weights) weight /= total;
    return weights;
}

// Numbers of samples around one and several fillings of the lanes (16 x 264 and 16 x 2056), starting at sample 0 and
// later.
void chunks_run_in_parallel(std::mt19937_64& random) {
    std::vector<std::vector<double>> cases = {{1},          {1, 1},
                                              {1, 1, 1},    {5, 3, 2},
                                              {0, 1, 0, 1}, {1, 2, 3e-6, 0.5},
                                              {1, 1e-9, 1}, {0.375, 0, 1e-9, 0.625 - 1e-9}};
    for (const size_t count : {1, 2, 3, 4, 5, 6, 9, 22, 100}) {
        cases.emplace_back(count, 1.0);  // ties at every sample
        cases.emplace_back();
        for (size_t k = 0; k < count; ++k) cases.back().push_back(std::lognormal_distribution<double>(0, 2)(random));
    }
    cases.emplace_back(50, 1e-6);  // each is chosen once in a million samples
    cases.back().push_back(1);
    for (const auto& weights : cases) {
        for (const int64_t count : {4223, 4224, 4226, 4300, 32895, 32897, 70001})
            expect_equal(Blend(shares(weights)), 0, count);
        Blend later(shares(weights));
        run_plain(later, 0, 777);
        expect_equal(later, 777, 5000);
    }
}

// Counts that no blend from sample 0 reaches: the guesses for the chunks are wrong, for a few samples or up to the end.
void counts_that_are_guessed_wrong(std::mt19937_64& random) {
    for (const auto& weights : std::vector<std::vector<double>>{
             {1, 1}, {7, 2, 1}, {1, 2, 3e-6, 0.5}, {5, 4, 3, 2, 1, 1e-5, 1e-5}, std::vector<double>(30, 1)}) {
        for (const int64_t first : {1, 1000, 100'000}) {
            for (int round = 0; round < 4; ++round) {
                Blend ours(shares(weights));
                for (size_t k = 0; k < weights.size(); ++k)
                    ours.taken[k] = std::llround(ours.weights[k] * static_cast<double>(first));
                // a sum that never becomes right
                if (round > 0) ours.taken[random() % weights.size()] += static_cast<int64_t>(random() % 50);
                // a dataset that gives no sample for a long time
                if (round > 1) ours.taken.back() += 5'000;
                if (round > 2)
                    ours.taken[0] =
                        std::max<int64_t>(0, ours.taken[0] - 5'000 - static_cast<int64_t>(random() % 40'000));
                expect_equal(ours, first, 50'000);
            }
        }
    }
    Blend negative({0.5, 0.5});
    negative.taken = {-3, 10};
    expect_equal(negative, 7, 20'000);
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

// Counts and sample numbers around 2^50 to 2^53, which the vectors cannot hold exactly: they go one by one.
void numbers_that_a_double_barely_holds() {
    for (const int bits : {50, 51, 52, 53}) {
        for (const std::vector<double>& weights :
             std::vector<std::vector<double>>{{0.5, 0.5}, {0.25, 0.75}, std::vector<double>(8, 0.125)}) {
            const int64_t first = (int64_t{1} << bits) - 1000;
            Blend ours(weights);
            for (size_t k = 0; k < weights.size(); ++k)
                ours.taken[k] = static_cast<int64_t>(weights[k] * static_cast<double>(first));
            expect_equal(ours, first, 5000);
            ours.taken[0] = first;  // one count is large, the sample number is not
            expect_equal(ours, 1, 5000);
        }
    }
    Blend many({});  // no count is large, the sample number is
    for (int k = 1; k <= 16; ++k) {
        many.weights.push_back(k / 136.0);
        many.taken.push_back(static_cast<int64_t>(many.weights.back() * 0x1p53));
    }
    expect_equal(many, int64_t{1} << 53, 5000);
}

void many_datasets() {
    for (const size_t count : {255, 256, 257, 300, 40000}) {
        Blend ours(std::vector<double>(count, 1.0 / static_cast<double>(count)));
        const int64_t samples = count > 1000 ? 64 : 2 * static_cast<int64_t>(count);
        ours.run(0, samples);
        for (int64_t i = 0; i < samples; ++i)
            EXPECT_EQ(ours.dataset[static_cast<size_t>(i)], static_cast<int32_t>(i % static_cast<int64_t>(count)));
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
    std::mt19937_64 random(20261126);
    equals_its_definition();
    chunks_run_in_parallel(random);
    counts_that_are_guessed_wrong(random);
    sample_numbers_beyond_32_bits();
    numbers_that_a_double_barely_holds();
    many_datasets();
    bad_weights();
    return tally.finish();
}
