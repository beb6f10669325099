// One collective of one size, so many times, for comparison. mpicc -O3 mpi.c -o mpi; mpirun -n N mpi NAME BYTES RUNS.
// Prints the number of ranks with a wrong result, then for each run the nanoseconds of the slowest rank.
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  int rank, world;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &world);
  if (argc < 4) MPI_Abort(MPI_COMM_WORLD, 2);
  const char *name = argv[1];
  size_t bytes = strtoull(argv[2], 0, 10);
  int runs = atoi(argv[3]), count = bytes / 4;
  int parted = !strcmp(name, "all_gather") || !strcmp(name, "reduce_scatter") || !strcmp(name, "all_to_all");
  if (parted) count = (count + world - 1) / world * world;
  int part = count / world;
  float *large = malloc(count * 4 + 64), *small = malloc(count * 4 + 64);
  double *times = malloc(runs * sizeof *times), *slowest = malloc(runs * sizeof *slowest);
  int wrong = 0;
  for (int run = -3; run < runs; run++) {
    if (run == -3)
      for (int i = 0; i < count; i++) large[i] = small[i] = rank + 1;
    if (run == -2) memset(large, 0, count * 4), memset(small, 0, count * 4);
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    float want = 0, got = 0;
    if (!strcmp(name, "all_reduce")) {
      MPI_Allreduce(MPI_IN_PLACE, large, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
      want = world * (world + 1) / 2, got = large[count - 1];
    } else if (!strcmp(name, "broadcast")) {
      MPI_Bcast(large, count, MPI_FLOAT, 0, MPI_COMM_WORLD);
      want = 1, got = large[count - 1];
    } else if (!strcmp(name, "all_gather")) {
      MPI_Allgather(small, part, MPI_FLOAT, large, part, MPI_FLOAT, MPI_COMM_WORLD);
      want = world, got = large[count - 1];
    } else if (!strcmp(name, "reduce_scatter")) {
      MPI_Reduce_scatter_block(large, small, part, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
      want = world * (world + 1) / 2, got = small[part - 1];
    } else if (!strcmp(name, "all_to_all")) {
      MPI_Alltoall(large, part, MPI_FLOAT, small, part, MPI_FLOAT, MPI_COMM_WORLD);
      want = world, got = small[count - 1];
    } else if (!strcmp(name, "send_recv")) {
      if (rank == 0) MPI_Send(large, count, MPI_FLOAT, 1, 0, MPI_COMM_WORLD);
      if (rank == 1) {
        MPI_Recv(small, count, MPI_FLOAT, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        want = 1, got = small[count - 1];
      }
    } else {
      MPI_Barrier(MPI_COMM_WORLD);
    }
    if (run >= 0) times[run] = MPI_Wtime() - start;
    if (run == -3) wrong = want != got;
  }
  int all = 0;
  MPI_Reduce(&wrong, &all, 1, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
  MPI_Reduce(times, slowest, runs, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  if (!rank) {
    printf("times %d", all);
    for (int run = 0; run < runs; run++) printf(" %.0f", slowest[run] * 1e9);
    printf("\n");
  }
  return MPI_Finalize();
}
