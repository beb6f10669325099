//! `cargo xtask hosts`: two hosts on one machine. Network namespaces joined by a virtual cable each run
//! two ranks under `tchrun --nnodes 2`: the conformance suite between hosts, its product over a slow
//! cable, and a cable that is cut.

use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str = "Run the conformance suite between two network namespaces (2 x 2 ranks), its
product over a slow cable, and cut the cable; needs root and iproute2
--only LIST of suite, slow, cut";

/// What can be picked.
const PARTS: [&str; 3] = ["suite", "slow", "cut"];

const TEST: &str = "whole::the_product_as_a_table";
/// How long a run of the suite may take, also on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(400);
/// The time limit of calls where the cable is cut: far more than a rank takes between two of them.
const TIMEOUT: &str = "8";
/// Ranks that lost each other know it, and their launchers have ended, this long after at the latest.
const SOON: Duration = Duration::from_secs(60);
/// What a slow cable is to `tc`.
const SLOW: [&str; 7] = ["tbf", "rate", "100mbit", "burst", "32kb", "latency", "50ms"];

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let parts: Vec<&str> = match arguments {
        [] => PARTS.to_vec(),
        [only, list] if only == "--only" => list.split(',').collect(),
        _ => bail!("unknown arguments {arguments:?}; known is --only"),
    };
    for part in &parts {
        ensure!(PARTS.contains(part), "there is no part {part:?}\n{ABOUT}");
    }
    on(&Hosts::new()?, &parts)
}

/// The step of CI. Where namespaces cannot be made it says so.
pub(crate) fn step() -> Result<()> {
    match Hosts::new() {
        Ok(hosts) => on(&hosts, &PARTS),
        Err(error) => {
            println!("NOT RUN: this machine cannot pretend to be two hosts: {error:#}");
            Ok(())
        }
    }
}

/// The suite over a fast cable, its product over a slow one, and over one that is cut.
fn on(hosts: &Hosts, parts: &[&str]) -> Result<()> {
    setup::ensure()?;
    execute(cargo().args(["build", "--quiet", "--bin", "tchrun"]))?;
    let programs = Programs { test: test_program()?, tchrun: setup::root().join("target/debug/tchrun") };

    if parts.contains(&"suite") {
        println!("the conformance suite, 2 hosts x 2 ranks");
        hosts.passes(&programs, &[("TCHD_CONFORMANCE_RANKS", "launched")])?;
    }
    if parts.contains(&"slow") {
        match hosts.slow() {
            Ok(()) => {
                println!("every pair of factors, over a cable of 100 Mbit/s");
                hosts.passes(&programs, &[("TCHD_CONFORMANCE_RANKS", "launched-product")])?;
                hosts.fast()?;
            }
            Err(error) => println!("NOT RUN: a slow cable: {error:#}"),
        }
    }
    if parts.contains(&"cut") {
        println!("the whole product, with the cable cut in the middle of it");
        cut(hosts, &programs)?;
    }
    Ok(())
}

/// What each node's ranks say of the others when the cable is cut.
fn cut(hosts: &Hosts, programs: &Programs) -> Result<()> {
    let sign = env::temp_dir().join(format!("tchd-hosts-{}", process::id()));
    // One of an earlier run with this number.
    let _ = fs::remove_file(&sign);
    // Each run begins with other cases.
    let from = (process::id().wrapping_mul(997)).to_string();
    println!("TCHD_CONFORMANCE_FROM={from}");
    let variables = [
        ("TCHD_CONFORMANCE_RANKS", "launched"),
        ("TCHD_CONFORMANCE_TIMEOUT", TIMEOUT),
        ("TCHD_CONFORMANCE_FROM", &from),
        ("TCHD_CONFORMANCE_SIGN", sign.to_str().context("the folder for temporary files")?),
    ];
    let nodes = [0, 1].map(|node| hosts.start(node, programs, &variables));
    let begin = Instant::now();
    while !sign.exists() && begin.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(20));
    }
    // Where there was none, the ranks say why.
    let _ = fs::remove_file(&sign);
    // Somewhere in the middle.
    thread::sleep(Duration::from_millis(500 + 4 * u64::from(begin.elapsed().subsec_millis())));
    hosts.cut()?;
    for (node, output) in all_ended(nodes, SOON).into_iter().enumerate() {
        let output = output.with_context(|| format!("node {node} hangs behind the cut cable"))?;
        let text = words(&output);
        ensure!(!output.status.success(), "node {node} ended well behind a cut cable:\n{text}");
        let said: Vec<_> = text.lines().filter_map(|line| Some((line.trim(), named(line)?))).collect();
        ensure!(!said.is_empty(), "node {node} does not say what happened:\n{text}");
        for (line, ranks) in said {
            // Ranks of the other host, and only those: both where it was a collective, one where it was a message.
            let away = if node == 0 { [2, 3] } else { [0, 1] };
            let right = !ranks.is_empty() && ranks.iter().all(|rank| away.contains(rank));
            ensure!(right, "node {node} names the wrong ranks: {line}\n{text}");
            println!("node {node}: {line}");
        }
    }
    Ok(())
}

/// The ranks that a line blames, if it is about a timeout.
fn named(line: &str) -> Option<Vec<usize>> {
    let (_, rest) = line.split_once("timed out after ")?;
    let words = rest.split_once(": ").map_or(rest, |(_, words)| words);
    Some(words.split([' ', ',']).filter_map(|word| word.parse().ok()).collect())
}

/// What is run on each host.
struct Programs {
    test: PathBuf,
    tchrun: PathBuf,
}

/// Builds the conformance test and finds its program.
fn test_program() -> Result<PathBuf> {
    let output = cargo()
        .args(["test", "--test", "conformance", "--no-run", "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .context("cargo does not start")?;
    ensure!(output.status.success(), "the conformance suite does not build");
    let text = String::from_utf8_lossy(&output.stdout);
    let path = text
        .lines()
        .filter(|line| line.contains("\"name\":\"conformance\""))
        .filter_map(|line| line.split("\"executable\":\"").nth(1)?.split('"').next())
        .next_back()
        .context("cargo does not say where the conformance suite is")?;
    Ok(PathBuf::from(path))
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Waits for the end of both nodes, but not for ever.
fn all_ended(nodes: [Result<Child>; 2], limit: Duration) -> [Result<Output>; 2] {
    thread::scope(|scope| {
        nodes.map(|child| scope.spawn(move || ended(child?, limit))).map(|waiter| match waiter.join() {
            Ok(output) => output,
            Err(_) => bail!("a waiter panicked"),
        })
    })
}

/// Waits for the end, but not for ever. The output is read meanwhile: a full pipe stops who writes.
fn ended(mut child: Child, limit: Duration) -> Result<Output> {
    let start = Instant::now();
    let id = rustix::process::Pid::from_child(&child);
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let reader = |pipe: &mut dyn std::io::Read| {
        let mut bytes = Vec::new();
        // What could not be read is missing in a message.
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    };
    thread::scope(|scope| {
        let stdout = scope.spawn(|| out.as_mut().map(|p| reader(p)).unwrap_or_default());
        let stderr = scope.spawn(|| err.as_mut().map(|p| reader(p)).unwrap_or_default());
        let mut late = false;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > limit && !late {
                late = true;
                // The launcher ends its ranks.
                rustix::process::kill_process(id, rustix::process::Signal::TERM)?;
            }
            if start.elapsed() > limit + Duration::from_secs(20) {
                child.kill()?;
            }
            thread::sleep(Duration::from_millis(50));
        };
        let output = Output {
            status,
            stdout: stdout.join().unwrap_or_default(),
            stderr: stderr.join().unwrap_or_default(),
        };
        if late {
            bail!("no end after {limit:?}:\n{}", words(&output));
        }
        Ok(output)
    })
}

/// Two namespaces and the cable between them; gone when dropped.
struct Hosts {
    names: [String; 2],
    /// Where the ranks meet on the first host.
    port: u16,
}

impl Hosts {
    fn new() -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "network namespaces need root");
        let id = process::id();
        // A port of this run's own: the namespaces are, but for what a failed run left.
        let port = 20_000 + (id % 10_000) as u16;
        let hosts = Self { names: [format!("tchd-a-{id}"), format!("tchd-b-{id}")], port };
        let [a, b] = &hosts.names;
        for name in [a, b] {
            ip(&["netns", "add", name])?;
            // What runs there needs more rights than to make it.
            ip(&["netns", "exec", name, "true"])?;
        }
        ip(&["link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b])?;
        for (name, address) in [(a, "10.231.7.1/24"), (b, "10.231.7.2/24")] {
            ip(&["-n", name, "address", "add", address, "dev", "cable"])?;
            ip(&["-n", name, "link", "set", "cable", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    /// Runs the test on both hosts to a good end.
    fn passes(&self, programs: &Programs, variables: &[(&str, &str)]) -> Result<()> {
        let start = Instant::now();
        let nodes = [0, 1].map(|node| self.start(node, programs, variables));
        let mut bad = Vec::new();
        for (node, output) in all_ended(nodes, PATIENCE).into_iter().enumerate() {
            let output = output.with_context(|| format!("node {node}"))?;
            let text = words(&output);
            if !output.status.success() {
                bad.push(format!("node {node} failed:\n{text}"));
            }
            text.lines().filter(|line| line.contains("test result")).for_each(|line| println!("{line}"));
        }
        ensure!(bad.is_empty(), "{}", bad.join("\n"));
        println!("{:.1} s", start.elapsed().as_secs_f64());
        Ok(())
    }

    /// Two ranks on one of the hosts.
    fn start(&self, node: usize, programs: &Programs, variables: &[(&str, &str)]) -> Result<Child> {
        let node_rank = node.to_string();
        Command::new("ip")
            .args(["netns", "exec", &self.names[node]])
            .arg(&programs.tchrun)
            .args(["--nnodes", "2", "--node-rank", &node_rank, "--nproc-per-node", "2"])
            .args(["--master-addr", "10.231.7.1", "--master-port", &self.port.to_string()])
            .arg(Path::new(&programs.test))
            .args(["--exact", TEST, "--nocapture"])
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("`ip netns exec` does not start: is iproute2 installed?")
    }

    /// Makes the cable slow, both ways.
    fn slow(&self) -> Result<()> {
        self.names.iter().try_for_each(|name| {
            let words = ["-n", name, "qdisc", "add", "dev", "cable", "root"];
            tool("tc", &[&words[..], &SLOW].concat())
        })
    }

    fn fast(&self) -> Result<()> {
        self.names
            .iter()
            .try_for_each(|name| tool("tc", &["-n", name, "qdisc", "del", "dev", "cable", "root"]))
    }

    fn cut(&self) -> Result<()> {
        ip(&["-n", &self.names[1], "link", "set", "cable", "down"])
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            // A namespace that could not be made cannot be removed either.
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    tool("ip", arguments)
}

fn tool(name: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(name)
        .args(arguments)
        .output()
        .with_context(|| format!("`{name}` does not start: is iproute2 installed?"))?;
    let words = arguments.join(" ");
    ensure!(
        output.status.success(),
        "`{name} {words}` failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::named;

    #[test]
    fn a_line_tells_whom_it_blames() {
        let line = "Reduce Int: rank 2 failed: reduce (sequence number 7) timed out after 8.0s: ranks 0, 1 did not arrive";
        assert_eq!(named(line), Some(vec![0, 1]));
        let line = "recv (sequence number 7) timed out after 8.0s: rank 1 did not arrive";
        assert_eq!(named(line), Some(vec![1]));
        let line = "barrier (sequence number 7) timed out after 8.0s: every rank arrived, but the transfer did not finish";
        assert_eq!(named(line), Some(vec![]));
        assert_eq!(named("test a::b ... ok"), None);
    }
}
