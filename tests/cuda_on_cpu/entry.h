#pragma once
#include <cstdint>

extern "C" {
void set_order(int order);
void set_most_bytes(long bytes);
int64_t scratch_of_projection(int m, int rows);
int64_t scratch_of_upgrad(int m);
int64_t scratch_of_weightings(int m);
int project(const double* gramian, int m, const double* given, int rows, int mode, int by_diagonal, double norm_eps,
            double reg_eps, double* out, int32_t* status, double* scratch);
int upgrad(const void* rows, int dtype, int m, int64_t columns, int64_t stride, const double* pref, int sum, int by_diagonal,
           double norm_eps, double reg_eps, double* weights, double* gramian, int32_t* status, double* scratch);
int weigh(int method, int m, const double* gramian, const double* pref, const int64_t* order, double a, double b,
          int64_t iterations, double* out, double* scratch);
}
