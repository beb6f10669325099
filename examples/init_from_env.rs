//! Who am I? From the environment alone, as torchrun, mpirun, srun and `launch::local` set it.

use tch_distributed as dist;

fn main() -> dist::Result<()> {
    dist::launch::local(2, || {
        dist::init_process_group("native", dist::InitOptions::new())?;
        println!("rank {} of {}", dist::rank()?, dist::world_size()?);
        dist::destroy_process_group()
    })
}
