"""The grouped products in Triton, under the names that the CPU twin has too."""

from moesaic.kernels.combine_triton import combine as combine
from moesaic.kernels.grouped_matmul_triton import rows as rows
from moesaic.kernels.grouped_matmul_triton import rows_activated as rows_activated
from moesaic.kernels.grouped_matmul_triton import rows_activated_backward as rows_activated_backward
from moesaic.kernels.grouped_outer_triton import column_sums as column_sums
from moesaic.kernels.grouped_outer_triton import outer as outer
from moesaic.kernels.tiny_triton import tiny_dot as tiny_dot
from moesaic.kernels.tiny_triton import tiny_outer as tiny_outer
from moesaic.kernels.tiny_triton import tiny_spread as tiny_spread
