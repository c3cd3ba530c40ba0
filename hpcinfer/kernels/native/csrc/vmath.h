/* Absolute value and exponential. exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2. Source: Cephes, expf.c. */

INLINE vf vf_abs(vf a) { return vf_bits(vi_and(vi_bits(a), vi_set1(0x7fffffff))); }

/* Exact at 0, error below 2 ulp; 0 below -86.5, so that no result is subnormal. */
INLINE vf vf_exp(vf x) {
    const vf power = vf_round(vf_max(vf_min(vf_mul(x, vf_set1(1.44269504f)), vf_set1(128.0f)), vf_set1(-125.0f)));
    vf r = vf_fma(power, vf_set1(-0.693359375f), x); /* ln(2) in two parts; the first times `power` is exact */
    r = vf_fma(power, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    p = vf_add(vf_fma(p, vf_mul(r, r), r), vf_set1(1.0f));
    const vf half_power = vf_bits(vi_shl(vi_add(vi_of_vf(power), vi_set1(126)), 23)); /* 2^128 is no float32 */
    const vf value = vf_mul(vf_mul(p, half_power), vf_set1(2.0f));
    return vf_select(vf_lt(x, vf_set1(-86.5f)), vf_zero(), value);
}
