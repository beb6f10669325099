//! What a rank's process is told, and how it ties its life to its parent's.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::TcpListener;
use std::process::Command;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use once_cell::sync::Lazy;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal, test_kill_process};

/// A process's place in the world: the variables that torchrun sets.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) local_rank: usize,
    pub(crate) local_world_size: usize,
    pub(crate) node: usize,
    pub(crate) nodes: usize,
    pub(crate) master_addr: String,
    pub(crate) master_port: u16,
    /// Names the job, so that another job on the same port is told apart.
    pub(crate) run_id: String,
    /// The launcher serves the store: all ranks are its clients.
    pub(crate) agent_store: bool,
}

impl Seat {
    /// The seat of `rank` in a world of `n` ranks, all on this host.
    pub(crate) fn on_this_host(rank: usize, n: usize, port: u16, run_id: &str, agent_store: bool) -> Self {
        Self {
            rank,
            world_size: n,
            local_rank: rank,
            local_world_size: n,
            node: 0,
            nodes: 1,
            master_addr: "127.0.0.1".to_owned(),
            master_port: port,
            run_id: run_id.to_owned(),
            agent_store,
        }
    }

    /// Gives the seat to a process.
    pub(crate) fn give(&self, command: &mut Command) {
        let numbers = [
            ("RANK", self.rank),
            ("WORLD_SIZE", self.world_size),
            ("LOCAL_RANK", self.local_rank),
            ("LOCAL_WORLD_SIZE", self.local_world_size),
            ("GROUP_RANK", self.node),
            ("GROUP_WORLD_SIZE", self.nodes),
            ("ROLE_RANK", self.rank),
            ("ROLE_WORLD_SIZE", self.world_size),
            ("TORCHELASTIC_RESTART_COUNT", 0),
            ("TORCHELASTIC_MAX_RESTARTS", 0),
        ];
        for (name, value) in numbers {
            command.env(name, value.to_string());
        }
        command
            .env("ROLE_NAME", "default")
            .env("MASTER_ADDR", &self.master_addr)
            .env("MASTER_PORT", self.master_port.to_string())
            .env("TORCHELASTIC_RUN_ID", &self.run_id)
            .env("TORCHELASTIC_USE_AGENT_STORE", if self.agent_store { "True" } else { "False" });
        // What the user has set stands.
        if std::env::var_os("TORCH_NCCL_ASYNC_ERROR_HANDLING").is_none() {
            command.env("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1");
        }
        // All ranks of a machine share its cores; libtorch would give each rank all of them.
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            let threads = (num_cpus::get() / self.local_world_size.max(1)).max(1);
            command.env("OMP_NUM_THREADS", threads.to_string());
        }
    }
}

/// Tells a rank's process whose child it is.
pub(crate) const PARENT: &str = "TCH_DISTRIBUTED_PARENT";

/// A variable's value where it is a number.
pub(crate) fn number<T: FromStr>(variable: &str) -> Option<T> {
    std::env::var(variable).ok()?.parse().ok()
}

fn random() -> u64 {
    // Each RandomState is keyed anew from the system's randomness.
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// A word that no other job has.
pub(crate) fn nonce() -> String {
    format!("{:016x}", random())
}

/// A port of this machine that nobody uses now.
pub(crate) fn free_port() -> std::io::Result<u16> {
    // Where this process begins, and goes on: what it was told is not told again before it is in use.
    static NEXT: Lazy<AtomicU64> = Lazy::new(|| AtomicU64::new(random() % PORTS));
    /// Below the range that the kernel hands out, so that no outgoing connection takes one meanwhile.
    const FIRST: u16 = 20_000;
    const PORTS: u64 = 12_000;
    for _ in 0..2000 {
        let port = FIRST + (NEXT.fetch_add(7, Ordering::Relaxed) % PORTS) as u16;
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return Ok(port);
        }
    }
    TcpListener::bind("0.0.0.0:0")?.local_addr().map(|address| address.port())
}

/// Whether the launcher started this process itself. A process whose launcher is gone ends here.
pub(crate) fn is_child_of(launcher: u32) -> bool {
    let launcher = i32::try_from(launcher).ok().and_then(Pid::from_raw);
    if launcher.is_some() && getppid() == launcher {
        return true;
    }
    if launcher.is_none_or(|launcher| test_kill_process(launcher).is_err()) {
        std::process::exit(1);
    }
    false
}

/// This process is to die when its parent dies, whatever way; at once if that has happened.
pub(crate) fn die_with_parent(parent: u32) {
    // Where the kernel does not offer it, the launcher's own signals have to do.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    if getppid().map(|p| Pid::as_raw(Some(p))) != i32::try_from(parent).ok() {
        std::process::exit(1);
    }
}
