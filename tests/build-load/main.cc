// Links every unit, so that a build that lost one does not pass.
#include <cstdio>

long unit_1();
long unit_2();
long LAST();

int main() {
    std::printf("%ld\n", unit_1() + unit_2() + LAST());
    return 0;
}
