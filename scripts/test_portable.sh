#!/usr/bin/env bash
# The CPU kernels' tests as on x86 CPUs with less: any there is, one with AVX2, one with AVX-512 but no VNNI.
set -euo pipefail
cd "$(dirname "$0")/.."

as() { # a CPU's name by LLVM, and its features
    echo "== $1 $2"
    NUMBA_CPU_NAME=$1 NUMBA_CPU_FEATURES=$2 python -m pytest tests/kernels
}

avx2=+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2
as x86-64 +sse2
as x86-64-v3 $avx2
if grep -q -m1 avx512vl /proc/cpuinfo; then
    as x86-64-v4 $avx2,+avx512f,+avx512bw,+avx512dq,+avx512cd,+avx512vl
fi
