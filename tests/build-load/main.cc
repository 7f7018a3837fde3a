// Links every unit, so that a build that lost one does not pass.
#include <cstdio>

long unit_1();
long unit_2();
long unit_12();

int main() {
    std::printf("%ld\n", unit_1() + unit_2() + unit_12());
    return 0;
}
