//! Owns: S3 stores that are other people's programs: moto_server (`tests/stores/install`) and Garage, started for one
//! test with an empty bucket.
//! Does not own: the store in this process (`s3.rs`).

use std::fs;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::postgres::free_port;
use super::process::{self, Reaped, Scratch};
use super::s3_rig::Reach;

const START_DEADLINE: Duration = process::DEADLINE;
const TOOL_DEADLINE: Duration = process::DEADLINE;
const BUCKET: &str = "archive";

/// A running store; it ends, and its content goes, when dropped.
#[derive(Debug)]
pub struct Store {
    pub reach: Reach,
    _process: Reaped,
    _scratch: Scratch,
}

fn start(mut command: Command, scratch: Scratch, reach: Reach) -> Store {
    let log = File::create(scratch.join("log")).expect("a log file can be made");
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file handle can be cloned")).stderr(log);
    let process = Reaped(command.spawn().unwrap_or_else(|error| panic!("could not start {command:?}: {error}")));
    let address = reach.endpoint.trim_start_matches("http://").to_owned();
    process::eventually(START_DEADLINE, "the store listens", || TcpStream::connect(&address).ok());
    Store { reach, _process: process, _scratch: scratch }
}

/// Moto's server, which keeps conditions on PUT and on completion; `None`, and said, where it is not installed.
pub fn moto() -> Option<Store> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/stores");
    let stores = std::env::var_os("SEAWALL_STORES").map_or(default, PathBuf::from);
    let program = stores.join("moto/bin/moto_server");
    if !program.exists() {
        println!("skipped: moto_server is not installed (tests/stores/install)");
        return None;
    }
    let port = free_port();
    let mut command = Command::new(program);
    command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
    let reach = Reach {
        endpoint: format!("http://127.0.0.1:{port}"),
        bucket: BUCKET.to_owned(),
        region: "us-east-1".to_owned(),
        access_key: "moto-access".to_owned(),
        secret_key: "moto-secret".to_owned(),
        ca_pem: None,
    };
    let store = start(command, Scratch::new(), reach);
    // It asks for no signature.
    let request =
        format!("PUT /{BUCKET} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Some(store)
}

/// Garage, which ignores conditions; `None`, and said, where it is neither on the PATH nor named by `$GARAGE`.
pub fn garage() -> Option<Store> {
    let on_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|directory| directory.join("garage")).find(|program| program.exists())
    };
    let Some(program) = std::env::var_os("GARAGE").map(PathBuf::from).or_else(on_path) else {
        println!("skipped: garage is not on the PATH, nor named by $GARAGE");
        return None;
    };
    const ACCESS_KEY: &str = "GK31c2f218a2e44f485b94239e";
    const SECRET_KEY: &str = "b892c0665f0ada8a4755dae98baa3b133590e11dae3bcc1f9d769d67f16c3835";
    let scratch = Scratch::new();
    let (port, rpc_port) = (free_port(), free_port());
    let configuration = scratch.join("garage.toml");
    let text = format!(
        "metadata_dir = \"{0}/meta\"\ndata_dir = \"{0}/data\"\ndb_engine = \"sqlite\"\nreplication_factor = 1\n\
         rpc_bind_addr = \"127.0.0.1:{rpc_port}\"\nrpc_public_addr = \"127.0.0.1:{rpc_port}\"\nrpc_secret = \"{1:064x}\"\n\
         [s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{port}\"\n",
        scratch.path().display(),
        1,
    );
    fs::write(&configuration, text).expect("a test's file can be written");
    let tool = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("-c").arg(&configuration).args(arguments);
        process::run(&mut command, TOOL_DEADLINE)
    };
    let mut command = Command::new(&program);
    command.env("RUST_LOG", "garage=warn").arg("-c").arg(&configuration).arg("server");
    let reach = Reach {
        endpoint: format!("http://127.0.0.1:{port}"),
        bucket: BUCKET.to_owned(),
        region: "garage".to_owned(),
        access_key: ACCESS_KEY.to_owned(),
        secret_key: SECRET_KEY.to_owned(),
        ca_pem: None,
    };
    let store = start(command, scratch, reach);
    let node = process::eventually(START_DEADLINE, "garage knows itself", || {
        let output = tool(&["node", "id", "-q"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let is_up = tool(&["status"]).status.success();
        (output.status.success() && is_up).then(|| text.split('@').next().unwrap_or_default().to_owned())
    });
    for arguments in [
        &["layout", "assign", "-z", "here", "-c", "20G", &node][..],
        &["layout", "apply", "--version", "1"],
        &["key", "import", "--yes", ACCESS_KEY, SECRET_KEY],
        &["bucket", "create", BUCKET],
        &["bucket", "allow", "--read", "--write", "--owner", BUCKET, "--key", ACCESS_KEY],
    ] {
        let output = tool(arguments);
        assert!(output.status.success(), "garage {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Some(store)
}
