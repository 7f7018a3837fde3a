// One translation unit of the build load: real library templates, and a table computed by a chain
// of instantiations, which is what makes compilers of template-heavy code large.
#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#ifndef UNIT
#error "compile with -DUNIT=n"
#endif

namespace unit {

template <int N> struct Tag {
    static constexpr int value = N * 31 + UNIT;
};

template <typename... Ts> struct List {
    static constexpr int sum = (0 + ... + Ts::value);
};

template <int N, typename... Ts> struct Grow : Grow<N - 1, Tag<N>, Ts...> {};
template <typename... Ts> struct Grow<0, Ts...> {
    using type = List<Ts...>;
};

template <typename T, std::size_t... Is> auto expand(std::index_sequence<Is...>) {
    return std::make_tuple(std::pair<Tag<Is>, T>{Tag<Is>{}, static_cast<T>(Is)}...);
}

template <std::size_t N> long fold() {
    auto values = expand<long>(std::make_index_sequence<N>{});
    return std::apply([](auto const &...each) { return (0L + ... + (each.first.value + each.second)); }, values);
}

}  // namespace unit

#define NAME2(n) unit_##n
#define NAME1(n) NAME2(n)

long NAME1(UNIT)() {
    std::map<std::string, std::variant<long, std::string, std::vector<long>>> table;
    std::unordered_map<std::string, std::function<long(long)>> functions;
    functions["a"] = [](long x) { return x + UNIT; };
    table["sum"] = static_cast<long>(unit::Grow<DEPTH>::type::sum);
    table["fold"] = unit::fold<WIDTH>();
    table["text"] = "unit" + std::to_string(UNIT);
    long result = 0;
    for (auto const &[key, value] : table) {
        if (auto const *number = std::get_if<long>(&value)) {
            result += functions["a"](*number) + static_cast<long>(key.size());
        }
    }
    return result;
}
