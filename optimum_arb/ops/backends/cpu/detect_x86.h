/* What an x86 processor has, and what the operating system lets a process use of it. */

static uint64_t x86_enabled_state(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Linux gives the registers of the matrix unit to a process that asks for them. */
static int amx_permitted(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
    return 0;
#endif
}

static int x86_supported(const char *name) {
    uint32_t a, b, c, d, a1 = 0, b7 = 0, c7 = 0, d7 = 0, a7_1 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* OSXSAVE */
    const uint64_t state = x86_enabled_state();
    const int fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!__get_cpuid_count(7, 0, &a1, &b7, &c7, &d7)) return 0;
    if (a1) __get_cpuid_count(7, 1, &a7_1, &b, &c, &d);
    const int avx2 = (state & 6) == 6 && fma && f16c && b7 >> 5 & 1;
    const int avx512 = avx2 && (state & 0xe6) == 0xe6 && b7 >> 16 & 1 && b7 >> 17 & 1 && b7 >> 30 & 1 && b7 >> 31 & 1;
    const int vnni = avx512 && c7 >> 11 & 1;
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx-vnni")) return avx2 && a7_1 >> 4 & 1;
    if (!strcmp(name, "avx512-vnni")) return vnni;
    const int bfloat = vnni && a7_1 >> 5 & 1; /* conversions to it: every processor with the matrix unit has them */
    if (!strcmp(name, "avx512-bf16")) return bfloat;
    return bfloat && c7 >> 8 & 1 && d7 >> 24 & 1 && d7 >> 25 & 1 && (state >> 17 & 3) == 3 && amx_permitted();
}
