//! TLS, channel binding and who is let in, on real servers, held against the real libpq: what `psql` does with a
//! connection string is what Seawall does with it. proto-notes/01-startup.md, "TLS".

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};
use seawall::error::Advice;
use seawall::postgres::{Conninfo, Environment, FileContent, Purpose, SystemEnvironment};
use seawall::replication::{ConnectError, Connection, NetDialer};

use crate::support::archived::{Archived, create_journal, note};
use crate::support::on_every_major;
use crate::support::postgres::{self, Installation, Server};
use crate::support::process::{self, Scratch};
use crate::support::rig::wait_for;

const PATIENCE: Duration = process::DEADLINE;
const PASSWORD: &str = "geheim";

// --- Certificates ------------------------------------------------------------------------------------------------

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn authority(name: &str, adjust: impl FnOnce(&mut CertificateParams)) -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut params = authority_params(name);
    adjust(&mut params);
    let pem = params.self_signed(&key).unwrap().pem();
    Authority { issuer: Issuer::new(params, key), pem }
}

fn leaf(common: &str, names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, common);
    params
}

/// All the files of these tests, in one directory both clients can read.
struct Files {
    scratch: Scratch,
}

impl Files {
    fn path(&self, name: &str) -> String {
        self.scratch.join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.scratch.join(name);
        fs::write(&path, text).unwrap();
        let mode = if name.ends_with(".key") { 0o600 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        process::give_to_service_user(&path);
    }

    fn pair(&self, name: &str, certificate: &str, key: &KeyPair) {
        self.write(&format!("{name}.crt"), certificate);
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn issue(&self, name: &str, by: &Authority, params: &CertificateParams, chain: &str) {
        let key = KeyPair::generate().unwrap();
        let pem = params.signed_by(&key, &by.issuer).unwrap().pem();
        self.pair(name, &(pem + chain), &key);
    }

    fn make() -> Files {
        let files = Files { scratch: Scratch::new() };
        fs::create_dir(files.scratch.join("home")).unwrap();
        process::give_to_service_user(&files.scratch.join("home"));
        let root = authority("test root", |_| {});
        let other = authority("another root", |_| {});
        let namesake = authority("test root", |_| {});
        let aged = authority("aged root", |params| params.not_after = date_time_ymd(2020, 1, 1));
        files.write("root.crt", &root.pem);
        files.write("other.crt", &other.pem);
        files.write("namesake.crt", &namesake.pem);
        files.write("aged-root.crt", &aged.pem);
        files.write("nonsense.crt", "nonsense");

        let names = ["localhost", "db.test", "*.wild.test", "127.0.0.1"];
        let good = leaf("localhost", &names);
        files.issue("good", &root, &good, "");
        files.issue("foreign", &other, &good, "");
        files.issue("common", &root, &leaf("localhost", &[]), "");
        files.issue("elsewhere", &root, &leaf("localhost", &["elsewhere.test"]), "");
        files.issue("under-aged", &aged, &good, "");
        let mut expired = good.clone();
        expired.not_after = date_time_ymd(2021, 1, 1);
        files.issue("expired", &root, &expired, "");
        let mut early = good.clone();
        early.not_before = date_time_ymd(2090, 1, 1);
        early.not_after = date_time_ymd(2099, 1, 1);
        files.issue("early", &root, &early, "");
        let mut for_clients = good.clone();
        for_clients.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        files.issue("for-clients", &root, &for_clients, "");

        let key = KeyPair::generate().unwrap();
        let alone = good.self_signed(&key).unwrap().pem();
        files.pair("alone", &alone, &key);
        let key = KeyPair::generate().unwrap();
        let mut own_authority = good.clone();
        own_authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        files.pair("own-authority", &own_authority.self_signed(&key).unwrap().pem(), &key);

        let key = KeyPair::generate().unwrap();
        let params = authority_params("test intermediate");
        let pem = params.signed_by(&key, &root.issuer).unwrap().pem();
        let intermediate = Authority { issuer: Issuer::new(params, key), pem };
        files.write("intermediate.crt", &intermediate.pem);
        files.issue("chained", &intermediate, &good, &intermediate.pem);
        files.issue("unchained", &intermediate, &good, "");
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let pem = good.signed_by(&key, &Authority::of_kind(&rcgen::PKCS_ECDSA_P384_SHA384, &files, "root384").issuer);
        files.pair("sha384", &pem.unwrap().pem(), &key);
        let edwards = Authority::of_kind(&rcgen::PKCS_ED25519, &files, "edwards-root");
        let key = KeyPair::generate().unwrap();
        files.pair("edwards", &good.signed_by(&key, &edwards.issuer).unwrap().pem(), &key);

        files.issue("client", &root, &leaf("u_cert", &[]), "");
        files.issue("stranger", &root, &leaf("somebody", &[]), "");
        files.issue("foreign-client", &other, &leaf("u_cert", &[]), "");
        files.write("open.crt", &fs::read_to_string(files.scratch.join("client.crt")).unwrap());
        files.write("open.key", &fs::read_to_string(files.scratch.join("client.key")).unwrap());
        fs::set_permissions(files.scratch.join("open.key"), fs::Permissions::from_mode(0o644)).unwrap();

        let mut revoked = good.clone();
        revoked.serial_number = Some(SerialNumber::from(666));
        files.issue("revoked", &root, &revoked, "");
        let list = |serials: &[u64], until| {
            let revoked = serials.iter().map(|serial| RevokedCertParams {
                serial_number: SerialNumber::from(*serial),
                revocation_time: date_time_ymd(2024, 1, 1),
                reason_code: None,
                invalidity_date: None,
            });
            let params = CertificateRevocationListParams {
                this_update: date_time_ymd(2024, 1, 1),
                next_update: date_time_ymd(until, 1, 1),
                crl_number: SerialNumber::from(1),
                issuing_distribution_point: None,
                revoked_certs: revoked.collect(),
                key_identifier_method: KeyIdMethod::Sha256,
            };
            params.signed_by(&root.issuer).unwrap().pem().unwrap()
        };
        files.write("root.crl", &list(&[666], 2090));
        files.write("stale.crl", &list(&[666], 2025));
        files.version_1();
        files
    }

    /// As PostgreSQL's documentation makes them: of X.509 version 1, with a common name only.
    fn version_1(&self) {
        let run = |arguments: &str| {
            let mut command = Command::new("openssl");
            command.current_dir(self.scratch.path()).args(arguments.split(' '));
            process::run_ok(&mut command, PATIENCE);
        };
        let has_openssl = Command::new("openssl").arg("version").output().is_ok();
        if !has_openssl {
            return println!("skipped: certificates of version 1 need the program `openssl`");
        }
        let csr = "req -new -nodes -newkey rsa:2048 -subj /CN=localhost -out v1.csr -keyout v1.key";
        run("req -new -nodes -newkey rsa:2048 -subj /CN=documented -out v1-root.csr -keyout v1-root.key");
        run("x509 -req -in v1-root.csr -days 3650 -signkey v1-root.key -out v1-root.crt");
        run(csr);
        run("x509 -req -in v1.csr -days 365 -CA v1-root.crt -CAkey v1-root.key -set_serial 7 -out v1.crt");
        for name in ["v1.key", "v1.crt", "v1-root.crt", "v1-root.key"] {
            self.write(name, &fs::read_to_string(self.scratch.join(name)).unwrap());
        }
    }
}

impl Authority {
    fn of_kind(algorithm: &'static rcgen::SignatureAlgorithm, files: &Files, name: &str) -> Authority {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let params = authority_params(name);
        let pem = params.self_signed(&key).unwrap().pem();
        files.write(&format!("{name}.crt"), &pem);
        Authority { issuer: Issuer::new(params, key), pem }
    }
}

// --- Both clients ------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Encrypted,
    Plain,
    Refused,
}

/// Nothing of whoever runs the tests: an empty home, no variables.
struct Surroundings {
    home: PathBuf,
}

impl Environment for Surroundings {
    fn var(&self, _name: &str) -> Option<String> {
        None
    }

    fn vars(&self, _prefix: &str) -> Vec<(String, String)> {
        Vec::new()
    }

    fn home(&self) -> Option<PathBuf> {
        Some(self.home.clone())
    }

    fn os_user(&self) -> Option<String> {
        None
    }

    fn read(&self, path: &Path) -> io::Result<FileContent> {
        SystemEnvironment.read(path)
    }

    fn is_directory(&self, path: &Path) -> bool {
        path.is_dir()
    }
}

struct Ground {
    files: Files,
    server: Server,
}

impl Ground {
    fn with(major: u32, hba: &str) -> Ground {
        let files = Files::make();
        let server = Server::builder(major)
            .wal_segment_mib(1)
            .tls_capable()
            .setting("ssl", "on")
            .setting("ssl_cert_file", &files.path("good.crt"))
            .setting("ssl_key_file", &files.path("good.key"))
            .setting("ssl_ca_file", &files.path("root.crt"))
            .setting("password_encryption", "scram-sha-256")
            .hba(hba)
            .start();
        for user in ["u_ssl", "u_nossl", "u_any", "u_scram", "u_md5", "u_pass", "u_cert", "u_none"] {
            let encryption = if user == "u_md5" { "md5" } else { "scram-sha-256" };
            server.sql(&format!("set password_encryption = '{encryption}'; create role {user} login replication superuser password '{PASSWORD}'"));
        }
        Ground { files, server }
    }

    fn new(major: u32) -> Ground {
        Ground::with(
            major,
            "hostssl all u_ssl all trust\nhostnossl all u_nossl all trust\nhost all u_any all trust\n\
             host all,replication u_scram all scram-sha-256\nhost all u_md5 all md5\nhost all u_pass all password\n\
             hostssl all,replication u_cert all scram-sha-256 clientcert=verify-full",
        )
    }

    /// What stands before every case: where the server is.
    fn conninfo(&self, case: &str) -> String {
        let host = if case.contains("host=") { "" } else { "host=localhost hostaddr=127.0.0.1 " };
        let case = case.replace("ROOT", &format!("sslrootcert={}", self.files.path("root.crt")));
        let case = case.replace("@", &format!("{}/", self.files.scratch.path().display()));
        let password = if case.contains("password=") { "" } else { " password=geheim" };
        format!("{host}port={} dbname=postgres connect_timeout=200{password} {case}", self.server.port())
    }

    fn home(&self) -> PathBuf {
        self.files.scratch.join("home")
    }

    fn psql(&self, case: &str) -> (Outcome, String) {
        let mut psql = Installation::newest_with("psql").command("psql");
        // The oldest psql with TLS may be the only one here; the rules are libpq's.
        let distribution = (13..=18).rev().filter_map(Installation::with_tls).find(|one| one.has("psql"));
        if let Some(one) = distribution {
            psql = one.command("psql");
        }
        if let Some(libraries) = Installation::newest_libpq() {
            psql.env("LD_LIBRARY_PATH", libraries);
        }
        psql.env("HOME", self.home());
        psql.args(["-XAtw", "-d", &self.conninfo(case), "-c"]);
        psql.arg("select ssl from pg_stat_ssl where pid = pg_backend_pid()");
        let output = process::run(&mut psql, PATIENCE);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let outcome = match stdout.trim() {
            "t" => Outcome::Encrypted,
            "f" => Outcome::Plain,
            _ => Outcome::Refused,
        };
        (outcome, stderr.into_owned())
    }

    fn open(&self, case: &str) -> Result<Connection, String> {
        let surroundings = Surroundings { home: self.home() };
        let conninfo = Conninfo::parse(&self.conninfo(case), &surroundings).map_err(|error| error.to_string())?;
        let login = conninfo.logins(Purpose::Sql, &surroundings).map_err(|error| error.to_string())?.logins.remove(0);
        let explain = |error: ConnectError| format!("{error} (hint: {})", error.hint().unwrap_or_default());
        wait_for(Connection::open(&NetDialer, &login)).map_err(explain)
    }

    fn ours(&self, case: &str) -> (Outcome, String) {
        match self.open(case) {
            Ok(connection) if connection.encrypted() => (Outcome::Encrypted, String::new()),
            Ok(_) => (Outcome::Plain, String::new()),
            Err(error) => (Outcome::Refused, error),
        }
    }

    /// The cases in which the two differ.
    fn compare<S: AsRef<str>>(&self, cases: impl IntoIterator<Item = S>) -> Vec<String> {
        let mut differences = Vec::new();
        let mut seen = Vec::new();
        for case in cases {
            let case = case.as_ref();
            let ((theirs, why), (ours, because)) = (self.psql(case), self.ours(case));
            println!("{theirs:?} {ours:?}  {case}");
            seen.push(theirs);
            assert!(!because.contains(PASSWORD), "{because}");
            if theirs != ours {
                differences.push(format!("{case}\n  libpq: {theirs:?} {}\n  ours: {ours:?} {because}", why.trim()));
            }
        }
        assert!(seen.len() < 4 || seen.iter().any(|one| *one != seen[0]), "cases that all end alike tell little");
        differences
    }

    /// Has the server show another certificate, and waits until it does.
    fn show(&mut self, name: &str) {
        let certificate = self.files.path(&format!("{name}.crt"));
        self.server.set("ssl_cert_file", &certificate);
        self.server.set("ssl_key_file", &self.files.path(&format!("{name}.key")));
        self.server.reload();
        // A new session is forked from a postmaster that has loaded it.
        process::eventually(PATIENCE, "the certificate is in use", || {
            (self.server.value("show ssl_cert_file") == certificate).then_some(())
        });
        let log = self.server.log();
        assert!(!log.contains("SSL configuration was not reloaded"), "{log}");
    }
}

fn assert_alike(differences: Vec<String>) {
    assert!(differences.is_empty(), "{} cases differ from libpq:\n{}", differences.len(), differences.join("\n"));
}

fn has_tls(major: u32) -> bool {
    let has = Installation::with_tls(major).is_some() && Installation::newest_libpq().is_some();
    if !has {
        println!("skipped: PostgreSQL {major} with TLS, or a libpq with it, is not installed");
    }
    has
}

const MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

// --- The tables --------------------------------------------------------------------------------------------------

on_every_major!(every_mode_ends_as_with_libpq);
fn every_mode_ends_as_with_libpq(major: u32) {
    if !has_tls(major) {
        return;
    }
    let mut ground = Ground::new(major);
    let mut cases = Vec::new();
    for mode in MODES {
        for user in ["u_ssl", "u_nossl", "u_any", "u_none"] {
            for roots in ["", "ROOT", "sslrootcert=@other.crt", "sslrootcert=@absent.crt"] {
                cases.push(format!("sslmode={mode} user={user} {roots}"));
            }
        }
        cases.push(format!("sslmode={mode} user=u_any sslrootcert=@nonsense.crt"));
        cases.push(format!("sslmode={mode} user=u_any ROOT host=db.test hostaddr=127.0.0.1"));
        cases.push(format!("sslmode={mode} user=u_any ROOT host=wrong.test hostaddr=127.0.0.1"));
        cases.push(format!("sslmode={mode} user=u_any ROOT host=a.wild.test hostaddr=127.0.0.1"));
        cases.push(format!("sslmode={mode} user=u_any ROOT host=a.b.wild.test hostaddr=127.0.0.1"));
        cases.push(format!("sslmode={mode} user=u_any ROOT host=127.0.0.1"));
        cases.push(format!("sslmode={mode} user=u_any ROOT hostaddr=127.0.0.1"));
    }
    let mut differences = ground.compare(&cases);
    // libpq's default places.
    let directory = ground.home().join(".postgresql");
    fs::create_dir(&directory).unwrap();
    for roots in ["root.crt", "other.crt"] {
        fs::copy(ground.files.scratch.join(roots), directory.join("root.crt")).unwrap();
        process::give_to_service_user(&directory);
        differences.extend(ground.compare(MODES.map(|mode| format!("sslmode={mode} user=u_any"))));
    }
    fs::remove_dir_all(&directory).unwrap();
    ground.server.set("ssl", "off");
    ground.server.restart();
    differences.extend(ground.compare(cases.iter().filter(|case| !case.contains("host="))));
    assert_alike(differences);
}

on_every_major!(every_certificate_is_judged_as_by_libpq);
fn every_certificate_is_judged_as_by_libpq(major: u32) {
    if !has_tls(major) {
        return;
    }
    let mut ground = Ground::new(major);
    let mut shown = vec![
        ("good", "root"),
        ("foreign", "root"),
        ("good", "namesake"),
        ("common", "root"),
        ("elsewhere", "root"),
        ("expired", "root"),
        ("early", "root"),
        ("for-clients", "root"),
        ("under-aged", "aged-root"),
        ("alone", "root"),
        ("alone", "alone"),
        ("own-authority", "own-authority"),
        ("own-authority", "root"),
        ("chained", "root"),
        ("chained", "intermediate"),
        ("unchained", "root"),
        ("sha384", "root384"),
    ];
    if ground.files.scratch.join("v1.crt").exists() {
        shown.extend([("v1", "v1-root"), ("v1", "root")]);
    }
    let mut differences = Vec::new();
    for (certificate, roots) in shown {
        ground.show(certificate);
        let cases = ["prefer", "require", "verify-ca", "verify-full"];
        let cases = cases.map(|mode| format!("sslmode={mode} user=u_scram sslrootcert=@{roots}.crt"));
        let unverified =
            ["prefer", "require"].map(|mode| format!("sslmode={mode} user=u_scram channel_binding=require"));
        let about = |text| format!("{certificate} by {roots}: {text}");
        let tables = [cases.as_slice(), unverified.as_slice()].concat();
        let found: Vec<String> = tables.iter().flat_map(|case| ground.compare([case])).map(about).collect();
        differences.extend(found);
    }
    assert_alike(differences);
}

on_every_major!(every_way_in_is_judged_as_by_libpq);
fn every_way_in_is_judged_as_by_libpq(major: u32) {
    if !has_tls(major) {
        return;
    }
    let ground = Ground::new(major);
    let mut cases = Vec::new();
    for user in ["u_scram", "u_md5", "u_pass", "u_any"] {
        for mode in ["disable", "require"] {
            for binding in ["disable", "prefer", "require"] {
                cases.push(format!("user={user} sslmode={mode} channel_binding={binding}"));
            }
        }
        for methods in ["scram-sha-256", "!scram-sha-256", "none", "!none", "md5,password", "!md5,!password"] {
            cases.push(format!("user={user} sslmode=prefer require_auth={methods}"));
        }
        cases.push(format!("user={user} password=wrong"));
        cases.push(format!("user={user} channel_binding=require sslmode=allow"));
        cases.push(format!("user={user} sslcertmode=require"));
    }
    for version in ["TLSv1", "TLSv1.2", "TLSv1.3"] {
        cases.push(format!("user=u_any sslmode=require ssl_min_protocol_version={version}"));
    }
    cases.push("user=u_scram sslmode=require channel_binding=require ssl_max_protocol_version=TLSv1.2".into());
    cases.push("user=u_any sslmode=require ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2".into());
    cases.push("user=u_any sslmode=require sslsni=0".into());
    assert_alike(ground.compare(&cases));
}

on_every_major!(client_certificates_are_shown_as_by_libpq);
fn client_certificates_are_shown_as_by_libpq(major: u32) {
    if !has_tls(major) {
        return;
    }
    let ground = Ground::new(major);
    let mut cases = Vec::new();
    for user in ["u_cert", "u_any"] {
        for mode in ["prefer", "verify-full ROOT"] {
            for pair in [
                "",
                "sslcert=@client.crt sslkey=@client.key",
                "sslcert=@stranger.crt sslkey=@stranger.key",
                "sslcert=@foreign-client.crt sslkey=@foreign-client.key",
                "sslcert=@client.crt sslkey=@stranger.key",
                "sslcert=@client.crt",
                "sslcert=@client.crt sslkey=@absent.key",
                "sslcert=@absent.crt sslkey=@client.key",
                "sslcert=@open.crt sslkey=@open.key",
                "sslcert=@client.crt sslkey=@client.key sslcertmode=disable",
                "sslcert=@client.crt sslkey=@client.key sslcertmode=require",
            ] {
                cases.push(format!("user={user} sslmode={mode} {pair}"));
            }
        }
    }
    assert_alike(ground.compare(&cases));
}

// Negotiation without SSLRequest: from 17 on; an older server takes the first byte for nonsense.
on_every_major!(direct_negotiation_ends_as_with_libpq);
fn direct_negotiation_ends_as_with_libpq(major: u32) {
    if !has_tls(major) {
        return;
    }
    let ground = Ground::new(major);
    let mut cases: Vec<String> =
        MODES.iter().map(|mode| format!("user=u_any sslnegotiation=direct ROOT sslmode={mode}")).collect();
    cases.push("user=u_any sslnegotiation=direct".into());
    cases.push("user=u_any sslnegotiation=direct sslmode=verify-full ROOT host=wrong.test hostaddr=127.0.0.1".into());
    let differences: Vec<String> = cases.iter().flat_map(|case| ground.compare([case])).collect();
    assert_alike(differences);
    let direct = ground.ours("user=u_any sslnegotiation=direct sslmode=require");
    assert_eq!(direct.0 == Outcome::Encrypted, major >= 17, "{}", direct.1);
}

#[test]
fn revocation_lists_are_obeyed() {
    let Some(major) = postgres::newest_major().filter(|&major| has_tls(major)) else { return };
    let mut ground = Ground::new(major);
    let lists = ground.files.scratch.join("lists");
    fs::create_dir(&lists).unwrap();
    fs::copy(ground.files.scratch.join("root.crl"), lists.join("any-name")).unwrap();
    let mut differences = Vec::new();
    for shown in ["revoked", "good", "chained"] {
        ground.show(shown);
        for list in ["", "sslcrl=@root.crl", "sslcrl=@stale.crl"] {
            differences.extend(ground.compare([format!("user=u_any sslmode=verify-full ROOT {list}")]));
        }
        let by_directory = ground.ours("user=u_any sslmode=verify-full ROOT sslcrldir=@lists");
        let expected = if shown == "good" { Outcome::Encrypted } else { Outcome::Refused };
        assert_eq!(by_directory.0, expected, "{shown}: {}", by_directory.1);
    }
    assert_alike(differences);
    ground.show("revoked");
    let (_, text) = ground.ours("user=u_any sslmode=verify-full ROOT sslcrl=@root.crl");
    assert!(text.contains("was revoked"), "{text}");
    let (outcome, text) = ground.ours("user=u_any sslmode=verify-full ROOT sslcrl=@absent.crl");
    assert!(outcome == Outcome::Refused && text.contains("absent.crl"), "a list asked for by name is not passed over");
}

/// What is read at three in the morning.
#[test]
fn refusals_say_which_file_which_name_and_which_date() {
    let Some(major) = postgres::newest_major().filter(|&major| has_tls(major)) else { return };
    let mut ground = Ground::new(major);
    let says = |ground: &Ground, case: &str, words: &[&str]| {
        let (outcome, text) = ground.ours(case);
        assert_eq!(outcome, Outcome::Refused, "{case}");
        for word in words {
            assert!(text.contains(word), "{case}: no {word:?} in {text}");
        }
    };
    let full = "user=u_any sslmode=verify-full ROOT";
    says(
        &ground,
        "user=u_any sslmode=verify-ca sslrootcert=@absent.crt",
        &["absent.crt does not exist", "sslrootcert="],
    );
    says(
        &ground,
        "user=u_any sslmode=verify-ca sslrootcert=@other.crt",
        &["CN=test root", "other.crt", "CN=another root"],
    );
    says(&ground, "user=u_any sslmode=verify-ca sslrootcert=@namesake.crt", &["CN=test root there has another key"]);
    let wrong = format!("{full} host=wrong.test hostaddr=127.0.0.1");
    says(&ground, &wrong, &["localhost, db.test, *.wild.test, 127.0.0.1", "wrong.test"]);
    says(&ground, "user=u_any sslmode=require sslcert=@open.crt sslkey=@open.key", &["open.key", "0644", "chmod 0600"]);
    says(
        &ground,
        "user=u_any sslmode=require sslcert=@client.crt sslkey=@stranger.key",
        &["stranger.key", "client.crt"],
    );
    says(&ground, "user=u_any channel_binding=require", &["channel_binding is `require`"]);
    ground.show("expired");
    says(&ground, full, &["CN=localhost expired on", "2021", "renew"]);
    ground.show("alone");
    says(&ground, full, &["self-signed", "root.crt"]);
    // PostgreSQL's own way to bind to a certificate without a hash is to fail.
    ground.show("edwards");
    says(&ground, "user=u_scram sslmode=require", &["names no hash", "channel_binding=disable"]);
    let unbound = ground.ours("user=u_scram sslmode=require channel_binding=disable");
    assert_eq!(unbound.0, Outcome::Encrypted, "{}", unbound.1);
    assert_alike(
        ["", "channel_binding=disable"]
            .map(|more| format!("user=u_scram sslmode=require {more}"))
            .iter()
            .flat_map(|case| ground.compare([case]))
            .collect(),
    );
}

#[test]
fn the_systems_roots_are_those_of_ssl_cert_file() {
    let Some(major) = postgres::newest_major().filter(|&major| has_tls(major)) else { return };
    let ground = Ground::new(major);
    // The variable is the process': the program is asked, not the library.
    let archived = Archived::by_conninfo(&ground.conninfo("user=u_scram sslrootcert=system"));
    let check = |file: &str| {
        let mut command = crate::support::agent::command(["--config", archived.config().to_str().unwrap(), "check"]);
        command.env("SSL_CERT_FILE", ground.files.path(file)).env("HOME", ground.home());
        String::from_utf8_lossy(&process::run(&mut command, PATIENCE).stdout).into_owned()
    };
    let found = check("root.crt");
    assert!(found.contains("verify-full"), "{found}");
    let found = check("other.crt");
    assert!(found.contains("the server's certificate is refused") && !found.contains("verify-full)"), "{found}");
}

on_every_major!(streams_over_verified_tls_with_a_certificate_and_a_bound_password);
fn streams_over_verified_tls_with_a_certificate_and_a_bound_password(major: u32) {
    if !has_tls(major) {
        return;
    }
    let mut ground = Ground::new(major);
    let negotiation = if major >= 17 { "sslnegotiation=direct" } else { "" };
    let case = format!(
        "user=u_cert sslmode=verify-full ROOT sslcert=@client.crt sslkey=@client.key channel_binding=require \
         require_auth=scram-sha-256 sslcertmode=require {negotiation}"
    );
    let archived = Archived::by_conninfo(&ground.conninfo(&case));
    let mut agent = archived.streaming_agent();
    create_journal(&ground.server);
    note(&ground.server, "over TLS");
    archived.wait_acknowledged(&ground.server);
    let encrypted = "select bool_and(ssl) and count(*) > 0 from pg_stat_replication join pg_stat_ssl using (pid)";
    assert_eq!(ground.server.value(encrypted), "t");

    // The server's certificate is replaced by one that is refused: nothing is sent to it, and the cure needs no restart.
    ground.show("expired");
    ground.server.sql("select pg_terminate_backend(pid) from pg_stat_replication");
    agent.wait_for_log("expired on", PATIENCE);
    ground.show("good");
    note(&ground.server, "after the renewal");
    archived.wait_acknowledged(&ground.server);
    assert!(agent.is_running());
    archived.assert_no_gaps();
}

/// N10: the password is changed while the agent runs, then in its password file; the role loses its right, and gets it back.
#[test]
fn changed_passwords_and_roles_are_waited_for() {
    let Some(major) = postgres::newest_major().filter(|&major| has_tls(major)) else { return };
    let ground = Ground::new(major);
    let passfile = ground.files.scratch.join("passfile");
    let write = |password: &str| {
        fs::write(&passfile, format!("*:*:*:u_scram:{password}\n")).unwrap();
        fs::set_permissions(&passfile, fs::Permissions::from_mode(0o600)).unwrap();
        process::give_to_service_user(&passfile);
    };
    write(PASSWORD);
    let conninfo =
        ground.conninfo("user=u_scram sslmode=require passfile=@passfile password=").replace("password= ", "");
    let archived = Archived::by_conninfo(conninfo.trim_end().trim_end_matches("password="));
    let mut agent = archived.streaming_agent();
    create_journal(&ground.server);
    archived.wait_acknowledged(&ground.server);
    let drop_session = || ground.server.sql("select pg_terminate_backend(pid) from pg_stat_replication");

    ground.server.sql("alter role u_scram password 'another'");
    drop_session();
    agent.wait_for_log("28P01", PATIENCE);
    write("another");
    note(&ground.server, "after the new password");
    archived.wait_acknowledged(&ground.server);

    ground.server.sql("alter role u_scram nosuperuser noreplication");
    drop_session();
    agent.wait_for_log("42501", PATIENCE);
    ground.server.sql("alter role u_scram replication");
    note(&ground.server, "after the right is back");
    archived.wait_acknowledged(&ground.server);
    assert!(agent.is_running());
    archived.assert_no_gaps();
    let said = agent.stderr();
    assert!(said.matches("28P01").count() < 5 && said.matches("42501").count() < 5, "no flood: {said}");
}
