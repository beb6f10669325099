//! What the environment says about this rank: torchrun's variables (Kubernetes sets the same), else
//! those of Open MPI, of PMI (MPICH, Intel MPI), of Slurm.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::store::wire;
use crate::{Error, Result};

/// Where variables are looked up; a map in tests.
pub(crate) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The process's own environment. What is no text is not absent: it is shown as what it is not.
pub(crate) fn process(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// One launcher's variables for rank, world size and local rank.
struct Names {
    rank: &'static str,
    size: &'static str,
    local: &'static str,
}

const TORCHRUN: Names = Names { rank: "RANK", size: "WORLD_SIZE", local: "LOCAL_RANK" };
// Open MPI inside a Slurm job sees Slurm's variables too, and they count its daemons; so it goes first.
const OTHERS: [Names; 3] = [
    Names { rank: "OMPI_COMM_WORLD_RANK", size: "OMPI_COMM_WORLD_SIZE", local: "OMPI_COMM_WORLD_LOCAL_RANK" },
    Names { rank: "PMI_RANK", size: "PMI_SIZE", local: "MPI_LOCALRANKID" },
    Names { rank: "SLURM_PROCID", size: "SLURM_NTASKS", local: "SLURM_LOCALID" },
];

fn present(env: Lookup<'_>, name: &str) -> bool {
    env(name).is_some_and(|text| !text.trim().is_empty())
}

/// The variables that hold here, if a launcher started this process.
fn names(env: Lookup<'_>) -> Option<&'static Names> {
    if present(env, TORCHRUN.rank) || present(env, TORCHRUN.size) {
        return Some(&TORCHRUN);
    }
    // A batch script has Slurm's variables, but is not one of srun's tasks.
    let batch = env("ENVIRONMENT").as_deref() == Some("BATCH")
        && !["SLURM_STEP_ID", "SLURM_STEPID", "SLURM_SRUN_COMM_HOST", "SLURM_LAUNCH_NODE_IPADDR"]
            .iter()
            .any(|name| present(env, name));
    OTHERS.iter().find(|names| {
        present(env, names.rank) && present(env, names.size) && !(batch && names.rank.starts_with("SLURM"))
    })
}

/// Whether a launcher has started this process as one of several ranks.
pub(crate) fn launched(env: Lookup<'_>) -> bool {
    names(env).is_some_and(|names| present(env, names.rank) && present(env, names.size))
}

fn number(env: Lookup<'_>, argument: &'static str, name: &str) -> Result<Option<usize>> {
    let Some(text) = env(name).filter(|text| !text.trim().is_empty()) else { return Ok(None) };
    text.trim().parse().map(Some).map_err(|_| {
        Error::invalid(
            argument,
            format!("the environment variable {name} is {text:?}, expected a whole number from 0"),
        )
    })
}

pub(crate) fn rank(env: Lookup<'_>) -> Result<Option<usize>> {
    names(env).map_or(Ok(None), |names| number(env, "rank", names.rank))
}

pub(crate) fn world_size(env: Lookup<'_>) -> Result<Option<usize>> {
    let Some(names) = names(env) else { return Ok(None) };
    if names.size == "SLURM_NTASKS" && present(env, "SLURM_STEP_NUM_TASKS") {
        return number(env, "world_size", "SLURM_STEP_NUM_TASKS");
    }
    number(env, "world_size", names.size)
}

pub(crate) fn local_rank(env: Lookup<'_>) -> Result<Option<usize>> {
    let name = names(env).map_or(TORCHRUN.local, |names| names.local);
    number(env, "local_rank", name)
}

/// Names this job, where its launcher has a name for it.
pub(crate) fn run_id(env: Lookup<'_>) -> String {
    if let Some(id) = env("TORCHELASTIC_RUN_ID").filter(|id| id != "none") {
        return id;
    }
    for name in ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"] {
        if let Some(id) = env(name) {
            return id;
        }
    }
    match (env("SLURM_JOB_ID"), env("SLURM_STEP_ID").or_else(|| env("SLURM_STEPID"))) {
        (Some(job), Some(step)) => format!("{job}.{step}"),
        _ => String::new(),
    }
}

/// How often the launcher has restarted the job: its store keeps the keys of earlier lives.
pub(crate) fn restarts(env: Lookup<'_>) -> String {
    env("TORCHELASTIC_RESTART_COUNT").unwrap_or_else(|| "0".to_owned())
}

/// The host and port of `env://`.
pub(crate) fn master(env: Lookup<'_>) -> Result<(String, u16)> {
    let missing = |argument, variable| Error::MissingArgument {
        argument,
        builder: "InitOptions::init_method (tcp://host:port)",
        variable,
    };
    let host = match env("MASTER_ADDR").filter(|host| !host.trim().is_empty()) {
        Some(host) => host.trim().to_owned(),
        None => launchers_host(env).ok_or_else(|| missing("master_addr", "MASTER_ADDR"))?,
    };
    let port = match env("MASTER_PORT").filter(|port| !port.trim().is_empty()) {
        Some(text) => port("master_port", "the environment variable MASTER_PORT", &text)?,
        None => launchers_port(env).ok_or_else(|| missing("master_port", "MASTER_PORT"))?,
    };
    Ok((host, port))
}

/// A port that ranks can meet at.
pub(crate) fn port(argument: &'static str, what: &str, text: &str) -> Result<u16> {
    let port = text.trim().parse::<u16>().ok().filter(|&port| port > 0);
    port.ok_or_else(|| {
        Error::invalid(argument, format!("{what} is {text:?}, expected a port from 1 to 65535"))
    })
}

fn launchers_host(env: Lookup<'_>) -> Option<String> {
    let local = [("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"), ("MPI_LOCALNRANKS", "PMI_SIZE")];
    if local.iter().any(|(here, all)| env(here).is_some() && env(here) == env(all)) {
        return Some("127.0.0.1".to_owned());
    }
    // Rank 0 is on the first node; srun itself may run elsewhere.
    let first = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"]
        .iter()
        .find_map(|name| env(name))
        .and_then(|list| first_node(&list));
    match (first, env("SLURM_LAUNCH_NODE_IPADDR")) {
        (Some(node), Some(address)) if wire::resolve(&node, 1).is_err() => Some(address),
        (Some(node), _) => Some(node),
        (None, address) => address,
    }
}

/// The first node of a list such as `gpu[07-09,12],login1`.
fn first_node(list: &str) -> Option<String> {
    let list = list.trim();
    let first = match list.find(['[', ',']) {
        None => list.to_owned(),
        Some(at) if list[at..].starts_with(',') => list[..at].to_owned(),
        Some(at) => {
            let (inside, after) = list[at + 1..].split_once(']')?;
            let number = inside.split([',', '-']).next()?;
            format!("{}{number}{}", &list[..at], after.split(',').next()?)
        }
    };
    (!first.is_empty()).then_some(first)
}

/// A port that all ranks of the job work out alike, and other jobs probably not.
fn launchers_port(env: Lookup<'_>) -> Option<u16> {
    let mut hasher = DefaultHasher::new();
    let id = run_id(env);
    if !id.is_empty() {
        id.hash(&mut hasher);
    } else if let Some(job) = env("SLURM_JOB_ID") {
        job.hash(&mut hasher);
    } else if present(env, "MPI_LOCALNRANKS") && env("MPI_LOCALNRANKS") == env("PMI_SIZE") {
        // All ranks are on this host, and one daemon of MPI has started them.
        rustix::process::getppid().map(rustix::process::Pid::as_raw_nonzero).hash(&mut hasher);
    } else {
        return None;
    }
    Some(20_000 + (hasher.finish() % 12_000) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(pairs: &[(&str, &str)], f: impl FnOnce(Lookup<'_>) -> T) -> T {
        f(&|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn each_launchers_variables_give_rank_size_and_local_rank() {
        let cases = [
            vec![("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")],
            vec![
                ("OMPI_COMM_WORLD_RANK", "3"),
                ("OMPI_COMM_WORLD_SIZE", "8"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
                ("SLURM_PROCID", "0"),
                ("SLURM_NTASKS", "2"),
            ],
            vec![("PMI_RANK", "3"), ("PMI_SIZE", "8"), ("MPI_LOCALRANKID", "1")],
            vec![("SLURM_PROCID", "3"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1")],
            vec![
                ("SLURM_PROCID", "3"),
                ("SLURM_NTASKS", "16"),
                ("SLURM_STEP_NUM_TASKS", "8"),
                ("SLURM_LOCALID", "1"),
            ],
        ];
        for case in cases {
            with(&case, |env| {
                assert!(launched(env), "{case:?}");
                assert_eq!(rank(env).unwrap(), Some(3), "{case:?}");
                assert_eq!(world_size(env).unwrap(), Some(8), "{case:?}");
                assert_eq!(local_rank(env).unwrap(), Some(1), "{case:?}");
            });
        }
    }

    #[test]
    fn a_batch_script_without_srun_is_no_rank() {
        let batch = [("ENVIRONMENT", "BATCH"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")];
        with(&batch, |env| assert!(!launched(env) && rank(env).unwrap().is_none()));
        let step = [batch[0], batch[1], batch[2], ("SLURM_STEP_ID", "0")];
        with(&step, |env| assert!(launched(env)));
    }

    #[test]
    fn numbers_and_ports_that_are_none_are_errors_that_name_the_variable() {
        with(&[("RANK", "abc"), ("WORLD_SIZE", "2")], |env| {
            let text = rank(env).unwrap_err().to_string();
            assert!(text.contains("RANK") && text.contains("\"abc\""), "{text}");
        });
        for wrong in ["99999", "0", "-1", "http"] {
            with(&[("MASTER_ADDR", "a"), ("MASTER_PORT", wrong)], |env| {
                let text = master(env).unwrap_err().to_string();
                assert!(text.contains("MASTER_PORT") && text.contains("1 to 65535"), "{text}");
            });
        }
    }

    #[test]
    fn ranks_of_mpi_on_several_hosts_are_told_to_name_a_port() {
        let rank = [("PMI_RANK", "1"), ("PMI_SIZE", "4"), ("MASTER_ADDR", "a")];
        with(&rank, |env| {
            assert!(matches!(master(env), Err(Error::MissingArgument { variable: "MASTER_PORT", .. })));
        });
        let here = [rank[0], rank[1], ("MPI_LOCALNRANKS", "4")];
        with(&here, |env| assert_eq!(master(env).unwrap().0, "127.0.0.1"));
    }

    #[test]
    fn a_missing_master_is_an_error_that_names_the_variable() {
        with(&[], |env| {
            assert!(matches!(master(env), Err(Error::MissingArgument { variable: "MASTER_ADDR", .. })));
        });
        with(&[("MASTER_ADDR", "here")], |env| {
            assert!(matches!(master(env), Err(Error::MissingArgument { variable: "MASTER_PORT", .. })));
        });
    }

    #[test]
    fn under_slurm_ranks_meet_on_the_first_node_at_a_port_of_the_job() {
        for (list, first) in
            [("gpu[07-09,12],login1", "gpu07"), ("a,b", "a"), ("alone", "alone"), ("n[3,5]-ib", "n3-ib")]
        {
            assert_eq!(first_node(list).unwrap(), first);
        }
        let job = [("SLURM_JOB_ID", "77"), ("SLURM_STEP_ID", "0"), ("SLURM_JOB_NODELIST", "n[3,5]")];
        let (host, port) = with(&job, |env| master(env).unwrap());
        assert_eq!((host.as_str(), with(&job, |env| master(env).unwrap().1)), ("n3", port));
        let unknown =
            [job[0], ("SLURM_JOB_NODELIST", "no-such.invalid"), ("SLURM_LAUNCH_NODE_IPADDR", "10.1.2.3")];
        assert_eq!(with(&unknown, |env| master(env).unwrap().0), "10.1.2.3");
    }
}
