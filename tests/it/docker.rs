//! What `docker/` promises, as far as it can be held against the program and against itself without a container engine:
//! its configurations load, ports, paths and times agree, and nothing runs as root or floats with a tag.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use seawall::config::{Config, Flags, Loaded, Sources};
use seawall::postgres::{Environment, FileContent};

const PORT: u16 = 9187;
/// The image's user.
const USER: &str = "65532";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file below `docker/`, by its path from the root.
fn files() -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![root().join("docker")];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).expect("docker/ is there") {
            let path = entry.expect("a directory entry").path();
            match path.is_dir() {
                // Made by secrets.sh, where somebody tries it.
                true if path.ends_with("secrets") => {}
                true => open.push(path),
                false => {
                    found.push(path.strip_prefix(root()).expect("below the root").to_str().expect("UTF-8").to_string())
                }
            }
        }
    }
    found.sort();
    found
}

/// A container as the examples make it: no variables, a secret wherever one is mounted.
struct Container;

impl Environment for Container {
    fn var(&self, _: &str) -> Option<String> {
        None
    }

    fn vars(&self, _: &str) -> Vec<(String, String)> {
        Vec::new()
    }

    fn home(&self) -> Option<PathBuf> {
        None
    }

    fn os_user(&self) -> Option<String> {
        None
    }

    fn read(&self, path: &Path) -> io::Result<FileContent> {
        if path.starts_with("/run/secrets") || path == Path::new("/etc/seawall/password") {
            return Ok(FileContent { bytes: b"secret\n".to_vec(), mode: 0o440 });
        }
        Ok(FileContent { bytes: fs::read(path)?, mode: 0o640 })
    }

    fn is_directory(&self, _: &Path) -> bool {
        false
    }
}

fn load(toml: &str) -> Loaded {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("seawall.toml");
    fs::write(&path, toml).expect("write the configuration");
    let sources = Sources { path: Some(&path), environment: &Container, flags: &Flags::default() };
    Config::load(sources).unwrap_or_else(|error| panic!("{error}\n{toml}"))
}

/// A block scalar of a YAML file: the lines behind `key: |` that are further in.
fn block(yaml: &str, key: &str) -> String {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mut lines = yaml.lines().skip_while(|line| line.trim() != format!("{key}: |"));
    let head = indent(lines.next().unwrap_or_else(|| panic!("no {key}")));
    let lines: Vec<&str> = lines.take_while(|line| line.trim().is_empty() || indent(line) > head).collect();
    let inner = lines.iter().find(|line| !line.trim().is_empty()).map_or(0, |line| indent(line));
    lines.iter().map(|line| line.get(inner..).unwrap_or("").to_string() + "\n").collect()
}

/// The values of `key: value` and `key = value` lines, flow style `{key: value}` included, without quotes.
fn values<'a>(text: &'a str, key: &'a str) -> Vec<&'a str> {
    let starts = text.match_indices(key).filter_map(move |(at, _)| {
        let before = text[..at].chars().next_back();
        let rest = text[at + key.len()..].strip_prefix([':', '='])?;
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != '-').then_some(rest)
    });
    starts.map(|rest| rest.split(['\n', ',', '}']).next().unwrap_or("").trim().trim_matches('"')).collect()
}

/// (file, configuration) of every example.
fn configurations() -> Vec<(String, String)> {
    files()
        .into_iter()
        .filter_map(|path| match path.as_str() {
            _ if path.ends_with("seawall.toml") => Some((path.clone(), text(&path))),
            _ if path.starts_with("docker/kubernetes/") && text(&path).contains("seawall.toml: |") => {
                Some((path.clone(), block(&text(&path), "seawall.toml")))
            }
            _ => None,
        })
        .collect()
}

#[test]
fn every_configuration_loads() {
    let configurations = configurations();
    assert_eq!(configurations.len(), 4, "{configurations:?}");
    for (path, toml) in configurations {
        let config = load(&toml).config;
        assert!(!config.clusters.is_empty(), "{path}");
        let http = config.http.unwrap_or_else(|| panic!("{path}: nothing to probe"));
        assert_eq!(http.listen.port(), PORT, "{path}");
        // In a container loopback is the container's own, and probes come from outside of it.
        assert_eq!(http.listen.ip().is_unspecified(), !path.contains("systemd"), "{path}");
        let spool = config.spool.unwrap_or_else(|| panic!("{path}: no spool"));
        assert!(spool.path.starts_with("/var/lib/seawall"), "{path}: the image and the unit own that directory alone");
    }
}

#[test]
fn only_the_stores_that_need_it_have_a_single_writer() {
    for (path, toml) in configurations() {
        assert_eq!(toml.contains("single_writer = true"), toml.contains("endpoint      = \"http://garage"), "{path}");
    }
}

#[test]
fn the_image_runs_as_a_number_and_ends_by_sigterm() {
    let dockerfile = text("docker/Dockerfile");
    let is_there = |line: &str| assert!(dockerfile.lines().any(|other| other == line), "no line {line:?}");
    is_there(&format!("USER {USER}:{USER}"));
    is_there("STOPSIGNAL SIGTERM");
    is_there(&format!("EXPOSE {PORT}"));
    is_there("ENTRYPOINT [\"/usr/local/bin/seawall\"]");
    is_there(&format!("ARG VERSION={}", env!("CARGO_PKG_VERSION")));
    is_there(&format!("FROM rust:{}-bookworm AS build", env!("CARGO_PKG_RUST_VERSION")));
    // The last stage has no shell: nothing can be run in it.
    let (_, last) = dockerfile.rsplit_once("\nFROM ").expect("two stages");
    assert!(!last.lines().any(|line| line.starts_with("RUN ")), "{last}");
    for copied in
        dockerfile.lines().filter_map(|line| line.strip_prefix("COPY ")).filter(|line| !line.contains("--from"))
    {
        for source in copied.split_whitespace().rev().skip(1) {
            assert!(root().join(source).exists(), "COPY {source}");
            assert!(
                text(".dockerignore").lines().any(|line| line == format!("!{source}")),
                "{source} is not let through"
            );
        }
    }
}

/// An image that changes under its name cannot be rolled back to.
#[test]
fn every_image_has_a_tag_and_none_is_latest() {
    let mut count = 0;
    for path in files() {
        let content = text(&path);
        let from = content.lines().filter_map(|line| line.strip_prefix("FROM ")?.split_whitespace().next());
        let images = if path.ends_with(".yaml") { values(&content, "image") } else { Vec::new() };
        for image in images.into_iter().chain(from.filter(|_| path.ends_with("Dockerfile"))) {
            let (_, tag) = image.rsplit_once(':').unwrap_or_else(|| panic!("{path}: {image} has no tag"));
            assert!(!tag.is_empty() && tag != "latest", "{path}: {image}");
            if image.contains("seawall") {
                assert_eq!(tag, env!("CARGO_PKG_VERSION"), "{path}: {image}");
            }
            count += 1;
        }
    }
    assert!(count >= 8, "{count}");
}

#[test]
fn containers_may_do_nothing_they_need_not() {
    for path in ["docker/kubernetes/sidecar.yaml", "docker/kubernetes/service.yaml"] {
        let manifest = text(path);
        let containers = values(&manifest, "image").len();
        for (key, value, count) in [
            ("runAsNonRoot", "true", 1),
            ("seccompProfile", "{type: RuntimeDefault", 1),
            ("allowPrivilegeEscalation", "false", containers),
            ("readOnlyRootFilesystem", "true", containers),
            ("capabilities", "{drop: [ALL]", containers),
            ("limits", "{memory: ", containers),
        ] {
            let found = values(&manifest, key);
            assert_eq!(found.len(), count, "{path}: {key}: {found:?}");
            assert!(found.iter().all(|other| other.starts_with(value.trim_end())), "{path}: {key}: {found:?}");
        }
        let users = values(&manifest, "runAsUser");
        assert!(
            users.iter().all(|user| user.parse::<u32>().is_ok_and(|uid| uid > 0)) && !users.is_empty(),
            "{users:?}"
        );
    }
    assert_eq!(values(&text("docker/kubernetes/service.yaml"), "runAsUser"), [USER]);
    let compose = text("docker/compose/compose.yaml");
    assert_eq!(values(&compose, "user"), [format!("{USER}:{USER}")]);
    assert_eq!(values(&compose, "read_only"), ["true"]);
}

/// A dead store must neither restart the agent nor take a server out of service.
#[test]
fn probes_ask_whether_the_process_is_up_and_nothing_else() {
    for path in ["docker/kubernetes/sidecar.yaml", "docker/kubernetes/service.yaml"] {
        let manifest = text(path);
        let probed: Vec<&str> =
            values(&manifest, "httpGet").iter().map(|found| found.trim_start_matches("{path: ")).collect();
        assert_eq!(probed, ["/healthz", "/readyz"], "{path}");
        assert_eq!(values(&manifest, "containerPort").iter().filter(|port| **port == PORT.to_string()).count(), 1);
    }
}

#[test]
fn every_orchestrator_waits_longer_than_the_agent_may_take() {
    let seconds = |found: &str| found.trim_end_matches('s').parse::<u64>().unwrap_or_else(|_| panic!("{found:?}"));
    let of_compose = text("docker/compose/compose.yaml");
    let (_, agent) = of_compose.split_once("\n  seawall:\n").expect("the agent's service");
    for (path, waits) in [
        ("docker/compose/seawall.toml", seconds(values(agent, "stop_grace_period")[0])),
        (
            "docker/kubernetes/sidecar.yaml",
            seconds(values(&text("docker/kubernetes/sidecar.yaml"), "terminationGracePeriodSeconds")[0]),
        ),
        (
            "docker/kubernetes/service.yaml",
            seconds(values(&text("docker/kubernetes/service.yaml"), "terminationGracePeriodSeconds")[0]),
        ),
        ("docker/systemd/seawall.toml", seconds(values(&text("docker/systemd/seawall.service"), "TimeoutStopSec")[0])),
    ] {
        let (_, toml) = configurations().into_iter().find(|(other, _)| other == path).expect("a configuration");
        for cluster in load(&toml).config.clusters {
            assert!(
                cluster.shutdown_grace.as_secs() * 2 < waits,
                "{path}: {:?} against {waits} s",
                cluster.shutdown_grace
            );
        }
    }
}

/// What a configuration reads, something must mount.
#[test]
fn secrets_that_are_read_are_mounted() {
    let compose = text("docker/compose/compose.yaml");
    for (path, toml) in configurations() {
        for file in values(&toml.replace(" ", ""), "password_file")
            .into_iter()
            .chain(values(&toml.replace(" ", ""), "token_file"))
        {
            let name = file.rsplit('/').next().expect("a name");
            let is_mounted = match path.as_str() {
                "docker/compose/seawall.toml" => compose.contains(&format!("file: secrets/{name}\n")),
                "docker/systemd/seawall.toml" => text("docker/systemd/seawall.tmpfiles").contains(&format!(" {file} ")),
                _ => file.starts_with("/run/secrets/seawall/") && text(&path).contains(&format!("\n  {name}: ")),
            };
            assert!(is_mounted, "{path}: {file}");
        }
    }
}

/// A typing mistake in an alert's expression is an alert that never fires.
#[test]
fn alerts_use_metrics_that_exist() {
    let alerts = text("docker/prometheus/alerts.yaml");
    let known = seawall::telemetry::meters::CATALOGUE;
    let mut count = 0;
    for expression in alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: ")) {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in words.filter(|word| word.starts_with("seawall_")) {
            assert!(known.iter().any(|metric| metric.name == name), "{name} in {expression}");
            count += 1;
        }
    }
    assert!(count >= 10, "{count}");
}
