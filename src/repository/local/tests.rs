//! The directory store on real file systems: full, read-only, gone; killed at each step; with failing system calls.
//! What needs root or strace says so and is skipped without. Ignored tests are child processes of the others.

use super::*;
use crate::testkit::conformance;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

fn scratch() -> (tempfile::TempDir, LocalBackend) {
    let directory = tempfile::tempdir().unwrap();
    let backend = LocalBackend::open(directory.path().to_path_buf());
    (directory, backend)
}

fn body(bytes: usize) -> [Bytes; 1] {
    [Bytes::from(vec![b'w'; bytes])]
}

fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.unwrap_err().kind
}

/// Every file below a directory, temporary ones too.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn a_directory_conforms() {
    let (directory, backend) = scratch();
    conformance::run_all(&backend, &Key::new("scratch")).await;
    let debris = files(directory.path()).into_iter().filter(|path| is_temp(path)).count();
    assert_eq!(debris, 0);
}

fn is_temp(path: &Path) -> bool {
    path.file_name().unwrap().to_str().unwrap().starts_with(TEMP_PREFIX)
}

#[tokio::test]
async fn a_missing_root_is_said_and_never_made() {
    let (directory, _) = scratch();
    let root = directory.path().join("not/there");
    let backend = LocalBackend::open(root.clone());
    let key = Key::new("a/b");
    assert_eq!(kind(backend.put_new(&key, &body(1)).await), StoreErrorKind::RootMissing);
    assert_eq!(kind(backend.begin_upload(&key).await), StoreErrorKind::RootMissing);
    assert_eq!(kind(backend.stat(&key).await), StoreErrorKind::RootMissing);
    assert_eq!(kind(backend.fetch(&key, 0..1).await), StoreErrorKind::RootMissing);
    assert_eq!(kind(backend.list(None).await), StoreErrorKind::RootMissing);
    assert_eq!(kind(backend.delete(&key).await), StoreErrorKind::RootMissing);
    assert!(!directory.path().join("not").exists());
    backend.create_root().await.unwrap();
    backend.create_root().await.expect("a root that exists is kept");
    backend.put_new(&key, &body(1)).await.unwrap();
    assert_eq!(root.metadata().unwrap().mode() & 0o777, 0o700);
}

/// The volume goes away while an upload runs; the mount point below it is an ordinary empty directory.
#[tokio::test]
async fn another_directory_in_the_roots_place_is_not_written_to() {
    let (directory, _) = scratch();
    let [root, aside] = ["root", "aside"].map(|name| directory.path().join(name));
    let backend = LocalBackend::open(root.clone());
    backend.create_root().await.unwrap();
    backend.put_new(&Key::new("a/b"), &body(1)).await.unwrap();
    let mut upload = backend.begin_upload(&Key::new("a/c")).await.unwrap();
    upload.append(body(1)[0].clone()).await.unwrap();

    std::fs::rename(&root, &aside).unwrap();
    assert_eq!(kind(backend.list(None).await), StoreErrorKind::RootMissing);
    std::fs::create_dir(&root).unwrap();
    let error = backend.put_new(&Key::new("a/d"), &body(1)).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::RootMissing);
    assert!(error.cause.contains("another directory") && error.cause.contains("inode"), "{error}");
    assert_eq!(kind(upload.complete().await), StoreErrorKind::RootMissing);
    assert_eq!(files(&root), [] as [PathBuf; 0]);
    assert!(!aside.join("a/c").exists());

    std::fs::remove_dir(&root).unwrap();
    std::fs::rename(&aside, &root).unwrap();
    upload.complete().await.expect("a call that failed may be repeated");
    assert_eq!(files(&root), [root.join("a/b"), root.join("a/c")]);
    backend.put_new(&Key::new("a/d"), &body(1)).await.expect("the volume is back");
}

/// Mounted anew, a volume may have another device number: its repository.json tells that it is the same.
#[tokio::test]
async fn a_remounted_repository_is_known_again() {
    let (directory, _) = scratch();
    let root = directory.path().join("root");
    let backend = LocalBackend::open(root.clone());
    backend.create_root().await.unwrap();
    backend.put_new(&layout::repository(), &[Bytes::from_static(b"id 1")]).await.unwrap();
    backend.stat(&layout::repository()).await.unwrap();
    for (id, expected) in [("id 1", Ok(Vec::new())), ("id 2", Err(StoreErrorKind::RootMissing))] {
        std::fs::rename(&root, directory.path().join(id)).unwrap();
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("repository.json"), id).unwrap();
        assert_eq!(backend.list(Some(&Key::new("a"))).await.map_err(|error| error.kind), expected);
    }
}

/// Made anew in the place of one that was lost, while an agent runs.
#[tokio::test]
async fn another_repository_in_the_roots_place_is_taken_only_when_it_is_looked_at_anew() {
    let (directory, _) = scratch();
    let root = directory.path().join("root");
    let backend = LocalBackend::open(root.clone());
    backend.create_root().await.unwrap();
    backend.put_new(&layout::repository(), &[Bytes::from_static(b"id 1")]).await.unwrap();
    backend.look_anew().await.unwrap();
    backend.put_new(&Key::new("a/b"), &body(1)).await.unwrap();

    std::fs::rename(&root, directory.path().join("lost")).unwrap();
    assert_eq!(kind(backend.look_anew().await), StoreErrorKind::RootMissing);
    // The mount point of a volume that is away says nothing, however often it is looked at.
    std::fs::create_dir(&root).unwrap();
    backend.look_anew().await.unwrap();
    assert_eq!(kind(backend.put_new(&Key::new("a/c"), &body(1)).await), StoreErrorKind::RootMissing);
    std::fs::write(root.join("repository.json"), "id 2").unwrap();
    assert_eq!(kind(backend.put_new(&Key::new("a/c"), &body(1)).await), StoreErrorKind::RootMissing);
    backend.look_anew().await.unwrap();
    backend.put_new(&Key::new("a/c"), &body(1)).await.unwrap();
    assert_eq!(files(&root), [root.join("a/c"), root.join("repository.json")]);
    // And it is told from the one before.
    std::fs::rename(&root, directory.path().join("new")).unwrap();
    std::fs::rename(directory.path().join("lost"), &root).unwrap();
    assert_eq!(kind(backend.list(None).await), StoreErrorKind::RootMissing);
}

/// A disk that hangs is a fake here: blocked threads in its place.
#[test]
fn a_hung_root_holds_so_many_threads_and_no_more_whoever_uses_it() {
    const CLUSTERS: usize = 4;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .max_blocking_threads(THREADS_PER_ROOT + 1)
        .build()
        .unwrap();
    let (hung, (_directory, healthy)) = (LocalBackend::open("/hung".into()), scratch());
    let started = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (let_go, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    runtime.block_on(async {
        for cluster in std::iter::repeat_with(|| hung.beside()).take(CLUSTERS) {
            for _ in 0..THREADS_PER_ROOT {
                let (cluster, started, held) = (cluster.clone(), started.clone(), held.clone());
                tokio::spawn(async move {
                    let operation = Operation { verb: "read", location: cluster.describe(), bytes: 0 };
                    let hangs = move |_: &Shared| {
                        started.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        // Until the other end is gone; the lock is part of the hang.
                        let _ = lock(&held).recv();
                        Ok(())
                    };
                    cluster.run(operation, hangs).await
                });
            }
        }
        while started.load(std::sync::atomic::Ordering::Relaxed) < THREADS_PER_ROOT {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for n in 0..3 {
            let key = Key::new(format!("a/{n}"));
            healthy.put_new(&key, &body(1)).await.expect("another root has a thread");
        }
        assert_eq!(started.load(std::sync::atomic::Ordering::Relaxed), THREADS_PER_ROOT);
    });
    drop(let_go);
}

#[tokio::test]
async fn objects_are_private() {
    let (directory, backend) = scratch();
    backend.put_new(&Key::new("a/b/c"), &body(1)).await.unwrap();
    let mode = |path: &str| directory.path().join(path).metadata().unwrap().mode() & 0o777;
    assert_eq!((mode("a"), mode("a/b"), mode("a/b/c")), (0o700, 0o700, 0o600));
}

#[tokio::test]
async fn odd_names_are_not_listed() {
    let (directory, backend) = scratch();
    backend.put_new(&Key::new("real"), &body(3)).await.unwrap();
    for name in [".seawall-tmp-1", ".nfs0001", ".snapshot"] {
        std::fs::write(directory.path().join(name), "x").unwrap();
    }
    std::fs::write(directory.path().join(OsStr::from_bytes(b"\xff\xfe")), "x").unwrap();
    symlink("/etc/passwd", directory.path().join("link")).unwrap();
    symlink("nowhere", directory.path().join("dangling")).unwrap();
    assert!(Command::new("mkfifo").arg(directory.path().join("fifo")).status().unwrap().success());
    let real = Entry::Object { name: "real".to_string(), bytes: 3 };
    assert_eq!(backend.list(None).await.unwrap(), [real]);
}

#[tokio::test]
async fn links_and_fifos_in_an_objects_place_lead_nowhere() {
    let (directory, backend) = scratch();
    let outside = directory.path().join("outside");
    let key = Key::new("link");
    symlink(&outside, directory.path().join("link")).unwrap();
    assert_eq!(kind(backend.put_new(&key, &body(1)).await), StoreErrorKind::AlreadyExists);
    assert!(!outside.exists(), "the link was followed");
    std::fs::write(&outside, "secret").unwrap();
    backend.fetch(&key, 0..6).await.expect_err("the link was followed");
    assert_eq!(backend.stat(&key).await.unwrap(), None);
    assert!(Command::new("mkfifo").arg(directory.path().join("fifo")).status().unwrap().success());
    assert_eq!(kind(backend.fetch(&Key::new("fifo"), 0..1).await), StoreErrorKind::NotFound);
}

#[tokio::test]
async fn debris_is_removed_by_age_unless_somebody_writes_it() {
    let (directory, backend) = scratch();
    let mut upload = backend.begin_upload(&Key::new("main/wal/object")).await.unwrap();
    let left_over = directory.path().join("main/wal/.seawall-tmp-00000000000000aa");
    std::fs::write(&left_over, "torn").unwrap();
    std::fs::write(directory.path().join("main/.other"), "not ours").unwrap();
    std::fs::create_dir_all(directory.path().join("main/empty")).unwrap();
    assert_eq!(backend.clean_debris(Duration::from_secs(3600)).await.unwrap(), 0);
    assert!(left_over.exists());
    assert_eq!(backend.clean_debris(Duration::ZERO).await.unwrap(), 1);
    assert!(!left_over.exists() && !directory.path().join("main/empty").exists());
    upload.complete().await.expect("the cleaner left the file of a living writer alone");
    assert_eq!(files(directory.path()), ["main/.other", "main/wal/object"].map(|name| directory.path().join(name)));
}

/// Puts and deletes in one directory: its removal when empty must not fail a put.
#[tokio::test(flavor = "multi_thread")]
async fn a_put_survives_the_removal_of_its_directory() {
    let (_directory, backend) = scratch();
    let worker = |name: &'static str| {
        let (backend, key) = (backend.clone(), Key::new(format!("a/b/{name}")));
        tokio::spawn(async move {
            for _ in 0..100 {
                backend.put_new(&key, &body(10)).await.unwrap();
                backend.delete(&key).await.unwrap();
            }
        })
    };
    let (one, two) = (worker("one"), worker("two"));
    one.await.unwrap();
    two.await.unwrap();
    assert_eq!(backend.list(None).await.unwrap(), []);
}

/// A file system of its own, unmounted on drop.
struct Mount(tempfile::TempDir);

impl Mount {
    /// `None`, with a message, where the test may not mount.
    fn tmpfs(options: &str) -> Option<Mount> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = mount(&["-t", "tmpfs", "-o", options, "tmpfs"], directory.path());
        if !mounted {
            eprintln!("skipped: mounting a tmpfs needs root");
            return None;
        }
        Some(Mount(directory))
    }
}

fn mount(arguments: &[&str], target: &Path) -> bool {
    let status = Command::new("mount").args(arguments).arg(target).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_no_space_until_there_is_room() {
    let Some(mount) = Mount::tmpfs("size=1m") else { return };
    let root = mount.0.path();
    let backend = LocalBackend::open(root.to_path_buf());
    let (big, other) = (Key::new("a/big"), Key::new("a/other"));
    let stored = Key::new("a/stored");
    backend.put_new(&stored, &body(600 << 10)).await.unwrap();

    assert_eq!(kind(backend.put_new(&big, &body(600 << 10)).await), StoreErrorKind::NoSpace);
    assert_eq!(files(root), [root.join("a/stored")], "no debris: it would keep the disk full");
    let mut upload = backend.begin_upload(&other).await.unwrap();
    upload.append(body(200 << 10)[0].clone()).await.unwrap();
    let refused = upload.append(body(600 << 10)[0].clone()).await;
    assert_eq!(kind(refused), StoreErrorKind::NoSpace);
    assert_eq!(kind(backend.put_new(&stored, &body(600 << 10)).await), StoreErrorKind::AlreadyExists);

    backend.delete(&stored).await.unwrap();
    upload.append(body(600 << 10)[0].clone()).await.expect("the part that found no room is taken now");
    upload.complete().await.unwrap();
    let whole = [body(200 << 10)[0].clone(), body(600 << 10)[0].clone()].concat();
    assert_eq!(backend.fetch(&other, 0..800 << 10).await.unwrap(), whole);
    backend.delete(&other).await.unwrap();
    // A child of another test that was forked just now holds the deleted file open until it runs its own program.
    let stored = async {
        while let Err(error) = backend.put_new(&big, &body(600 << 10)).await {
            assert_eq!(error.kind, StoreErrorKind::NoSpace);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), stored).await.expect("there is room again");
    assert_eq!(backend.fetch(&big, 0..600 << 10).await.unwrap(), body(600 << 10)[0]);
}

#[tokio::test]
async fn a_read_only_volume_is_read_and_refuses_writes() {
    let Some(volume) = Mount::tmpfs("size=1m") else { return };
    let root = volume.0.path();
    let backend = LocalBackend::open(root.to_path_buf());
    let key = Key::new("a/object");
    backend.put_new(&key, &body(5)).await.unwrap();
    let mut upload = backend.begin_upload(&Key::new("a/upload")).await.unwrap();
    upload.append(body(5)[0].clone()).await.unwrap();
    upload.abort().await.unwrap();
    assert!(mount(&["-o", "remount,ro"], root));
    for backend in [backend, LocalBackend::open(root.to_path_buf())] {
        assert_eq!(kind(backend.put_new(&Key::new("a/new"), &body(1)).await), StoreErrorKind::ReadOnly);
        assert_eq!(kind(backend.put_new(&Key::new("b/new"), &body(1)).await), StoreErrorKind::ReadOnly);
        assert_eq!(kind(backend.begin_upload(&Key::new("c")).await), StoreErrorKind::ReadOnly);
        assert_eq!(kind(backend.delete(&key).await), StoreErrorKind::ReadOnly);
        assert_eq!(backend.stat(&key).await.unwrap(), Some(5));
        assert_eq!(backend.fetch(&key, 0..5).await.unwrap(), body(5)[0]);
        assert_eq!(backend.list(Some(&Key::new("a"))).await.unwrap().len(), 1);
    }
}

#[tokio::test]
async fn an_unmounted_volume_is_a_missing_root() {
    let Some(volume) = Mount::tmpfs("size=1m") else { return };
    let root = volume.0.path();
    let backend = LocalBackend::open(root.to_path_buf());
    backend.put_new(&Key::new("a/object"), &body(5)).await.unwrap();
    assert!(Command::new("umount").arg(root).status().unwrap().success(), "an idle backend holds nothing open");
    assert_eq!(kind(backend.put_new(&Key::new("a/next"), &body(5)).await), StoreErrorKind::RootMissing);
    assert_eq!(kind(backend.stat(&Key::new("a/object")).await), StoreErrorKind::RootMissing);
    assert_eq!(files(root), [] as [PathBuf; 0]);
}

const CHILD_ROOT: &str = "SEAWALL_TEST_CHILD_ROOT";

/// This test binary again, running only `test` (an ignored one), as a process that may be killed.
fn child(test: &str, root: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("repository::local::tests::{test}"), "--ignored", "--test-threads=1"]);
    command.env(CHILD_ROOT, root).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn child_backend() -> Option<LocalBackend> {
    std::env::var_os(CHILD_ROOT).map(|root| LocalBackend::open(root.into()))
}

#[tokio::test]
#[ignore = "a child process of `permissions_are_missing_for_another_user`"]
async fn child_without_permission() {
    let Some(backend) = child_backend() else { return };
    let key = Key::new("open/object");
    assert_eq!(backend.stat(&key).await.unwrap(), Some(5));
    assert_eq!(kind(backend.put_new(&Key::new("open/new"), &body(1)).await), StoreErrorKind::PermissionDenied);
    assert_eq!(kind(backend.put_new(&Key::new("new/new"), &body(1)).await), StoreErrorKind::PermissionDenied);
    assert_eq!(kind(backend.fetch(&key, 0..5).await), StoreErrorKind::PermissionDenied);
    assert_eq!(kind(backend.delete(&key).await), StoreErrorKind::PermissionDenied);
    assert_eq!(kind(backend.list(Some(&Key::new("closed"))).await), StoreErrorKind::PermissionDenied);
}

#[tokio::test]
async fn permissions_are_missing_for_another_user() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: becoming another user needs root");
        return;
    }
    let (directory, backend) = scratch();
    for name in ["open/object", "closed/object"] {
        backend.put_new(&Key::new(name), &body(5)).await.unwrap();
    }
    for (name, mode) in [("", 0o755), ("open", 0o755), ("closed", 0o700)] {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(directory.path().join(name), permissions).unwrap();
    }
    let mut child = child("child_without_permission", directory.path());
    match child.uid(65534).gid(65534).stdout(Stdio::piped()).output() {
        Ok(output) => assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}"),
        Err(error) => eprintln!("skipped: another user cannot run the test binary: {error}"),
    }
}

/// Object `n` is this long, so that a torn one is recognised by its name alone.
fn expected(name: &str) -> Vec<u8> {
    let n: u64 = name.rsplit('-').next().unwrap().parse().unwrap();
    let mut rng = fastrand::Rng::with_seed(n);
    let mut content = vec![0; rng.usize(0..300_000)];
    rng.fill(&mut content);
    content
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a child process of `a_killed_writer_leaves_only_whole_objects`"]
async fn child_that_puts_until_killed() {
    let Some(backend) = child_backend() else { return };
    let first = fastrand::u32(..);
    for n in 0.. {
        let key = |kind| Key::new(format!("{kind}/{}/{kind}-{}", n % 7, u64::from(first) << 20 | n));
        let (put, uploaded) = (key("put"), key("uploaded"));
        let content = |key: &Key| Bytes::from(expected(key.file_name()));
        backend.put_new(&put, &[content(&put)]).await.unwrap();
        let mut upload = backend.begin_upload(&uploaded).await.unwrap();
        for part in content(&uploaded).chunks(70_000) {
            upload.append(Bytes::copy_from_slice(part)).await.unwrap();
        }
        upload.complete().await.unwrap();
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_killed_writer_leaves_only_whole_objects() {
    let (directory, backend) = scratch();
    for round in 0..12 {
        let before = files(directory.path()).len();
        let writer = Killed(child("child_that_puts_until_killed", directory.path()).spawn().unwrap());
        // However busy the machine is: it dies while it is writing, not while it starts.
        for _ in 0..30_000 {
            tokio::time::sleep(Duration::from_millis(10 + round)).await;
            if files(directory.path()).len() > before + 3 {
                break;
            }
        }
        drop(writer);
    }
    let (temps, objects): (Vec<_>, Vec<_>) = files(directory.path()).into_iter().partition(|path| is_temp(path));
    assert!(objects.len() > 24, "the children stored only {} objects", objects.len());
    for path in &objects {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(std::fs::read(path).unwrap() == expected(name), "{name} is torn");
    }
    assert_eq!(backend.clean_debris(Duration::ZERO).await.unwrap(), temps.len());
    assert_eq!(files(directory.path()), objects);
}

/// Runs an ignored test with system calls failing as `inject` says (strace's words); `false` when it cannot.
fn child_with_failing_calls(test: &str, root: &Path, inject: &[&str]) -> bool {
    let Some(status) = child_with_calls(test, root, inject) else { return false };
    assert!(status.success(), "{test} failed with {inject:?}");
    std::fs::remove_file(root.join(CHILD_WAS_HERE)).expect("the child ran");
    true
}

fn child_with_calls(test: &str, root: &Path, inject: &[&str]) -> Option<std::process::ExitStatus> {
    let traces = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !traces(Command::new("strace").arg("true")).is_ok_and(|status| status.success()) {
        eprintln!("skipped: strace is not installed, or may not trace");
        return None;
    }
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null"]);
    for call in inject {
        command.args(["-e", &format!("inject={call}")]);
    }
    let child = child(test, root);
    command.arg(child.get_program()).args(child.get_args()).env(CHILD_ROOT, root);
    Some(traces(&mut command).unwrap())
}

/// Left by a child that came to its end, so that a test that runs no child does not pass.
const CHILD_WAS_HERE: &str = "child_was_here";

fn child_done() {
    std::fs::write(Path::new(&std::env::var_os(CHILD_ROOT).unwrap()).join(CHILD_WAS_HERE), "").unwrap();
}

#[tokio::test]
#[ignore = "a child process of `a_file_whose_fsync_failed_is_discarded`"]
async fn child_whose_first_put_fails() {
    let Some(backend) = child_backend() else { return };
    let first = backend.put_new(&Key::new("object"), &[Bytes::from_static(b"first")]).await;
    assert_eq!(kind(first), StoreErrorKind::Unavailable);
    child_done();
}

/// The first fsync is the root's, the second the file's, the third the directory's.
#[test]
fn a_file_whose_fsync_failed_is_discarded() {
    let (directory, _) = scratch();
    let fails = |nth: &str| {
        let inject = format!("fsync:error=EIO:when={nth}");
        child_with_failing_calls("child_whose_first_put_fails", directory.path(), &[&inject])
    };
    if !fails("2") {
        return;
    }
    assert_eq!(files(directory.path()), [] as [PathBuf; 0], "neither the object nor its temporary file");
    fails("3");
    let object = directory.path().join("object");
    assert_eq!(files(directory.path()), std::slice::from_ref(&object), "whole, but its writer was told of a failure");
    assert_eq!(std::fs::read(object).unwrap(), b"first");
    // The retry syncs the directory before it says "already exists": its caller counts that as stored.
    fails("2");
}

#[tokio::test]
#[ignore = "a child process of `odd_answers_of_the_system_are_coped_with`"]
async fn child_that_conforms() {
    let Some(backend) = child_backend() else { return };
    let scratch = Key::new("scratch");
    conformance::put_new_refuses_overwrite(&backend, &scratch).await;
    conformance::parts_are_concatenated(&backend, &Key::new("parts")).await;
    conformance::an_upload_refuses_a_taken_name(&backend, &Key::new("uploads")).await;
    conformance::of_two_concurrent_puts_one_wins(&backend, &Key::new("race")).await;
    child_done();
}

#[test]
fn odd_answers_of_the_system_are_coped_with() {
    for inject in [
        &["renameat2:error=EINVAL"][..],
        &["renameat2:error=ENOSYS"],
        &["writev:error=EINTR:when=1+3", "fsync:error=EINTR:when=1+2"],
        &["flock:error=ENOLCK"],
    ] {
        let (directory, _) = scratch();
        if !child_with_failing_calls("child_that_conforms", directory.path(), inject) {
            return;
        }
        assert!(!files(directory.path()).iter().any(|path| is_temp(path)), "{inject:?} left debris");
    }
}

#[tokio::test]
#[ignore = "a child process of `neither_rename_nor_link_is_unsupported`"]
async fn child_that_cannot_name() {
    let Some(backend) = child_backend() else { return };
    let put = backend.put_new(&Key::new("object"), &body(1)).await;
    assert_eq!(kind(put), StoreErrorKind::Unsupported);
    child_done();
}

/// Rather than the rename that would overwrite.
#[test]
fn neither_rename_nor_link_is_unsupported() {
    let (directory, _) = scratch();
    let inject = ["renameat2:error=EINVAL", "linkat:error=EPERM"];
    child_with_failing_calls("child_that_cannot_name", directory.path(), &inject);
    assert_eq!(files(directory.path()), [] as [PathBuf; 0]);
}

/// More parts than one `writev` takes, so that one can be killed in the middle.
fn parts() -> Vec<Bytes> {
    (0..1500u32).map(|n| Bytes::from(n.to_be_bytes().repeat(100))).collect()
}

#[tokio::test]
#[ignore = "a child process of `killed_at_each_step_a_put_is_whole_or_absent`"]
async fn child_that_puts_once() {
    let Some(backend) = child_backend() else { return };
    backend.put_new(&Key::new("a/object"), &parts()).await.unwrap();
    child_done();
}

/// The kill matrix of a put: the child dies at the named call, before it; then a new agent puts the same object.
#[tokio::test]
async fn killed_at_each_step_a_put_is_whole_or_absent() {
    let steps = [
        ("mkdirat", 1, false),
        ("fsync", 1, false), // the root, with the new directory's name in it
        ("flock", 1, false),
        ("writev", 1, false),
        ("writev", 2, false),
        ("fsync", 2, false), // the file
        ("renameat2", 1, false),
        ("fsync", 3, true), // its directory
    ];
    for (call, nth, there) in steps {
        let (directory, _) = scratch();
        let inject = format!("{call}:signal=KILL:when={nth}");
        let Some(status) = child_with_calls("child_that_puts_once", directory.path(), &[&inject]) else { return };
        assert!(!status.success() && !directory.path().join(CHILD_WAS_HERE).exists(), "{inject}: not killed");

        let backend = LocalBackend::open(directory.path().to_path_buf());
        let key = Key::new("a/object");
        assert_eq!(backend.stat(&key).await.unwrap().is_some(), there, "{inject}");
        match backend.put_new(&key, &parts()).await {
            Ok(()) => assert!(!there, "{inject}: overwritten"),
            Err(error) => assert!(there && error.is(StoreErrorKind::AlreadyExists), "{inject}: {error}"),
        }
        let whole = parts().concat();
        assert_eq!(backend.fetch(&key, 0..whole.len() as u64).await.unwrap(), whole, "{inject}");
        backend.clean_debris(Duration::ZERO).await.unwrap();
        assert_eq!(files(directory.path()), [directory.path().join("a/object")], "{inject}");
    }
}
