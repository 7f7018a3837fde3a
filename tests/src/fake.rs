//! A container runtime that is not real: it says that there are as many containers as a test wants, as fast as it
//! wants, and writes the limits that it is asked for into their cgroups.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;
use bellows::{
    cgroup::{Cgroup, Limit},
    cri::api::{
        Container, ContainerEventResponse, ContainerMetadata, ContainerResources, ContainerState,
        ContainerStatus, ContainerStatusRequest, ContainerStatusResponse, CreateContainerRequest,
        CreateContainerResponse, GetEventsRequest, LinuxContainerResources, ListContainersRequest,
        ListContainersResponse, ListPodSandboxRequest, ListPodSandboxResponse, PodSandbox,
        PodSandboxMetadata, RemoveContainerRequest, RemoveContainerResponse,
        RemovePodSandboxRequest, RemovePodSandboxResponse, RunPodSandboxRequest,
        RunPodSandboxResponse, RuntimeConfigRequest, RuntimeConfigResponse, StartContainerRequest,
        StartContainerResponse, StopContainerRequest, StopContainerResponse, StopPodSandboxRequest,
        StopPodSandboxResponse, UpdateContainerResourcesRequest, UpdateContainerResourcesResponse,
        VersionRequest, VersionResponse,
        runtime_service_server::{RuntimeService, RuntimeServiceServer},
    },
};
use bellows_core::Bytes;
use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::{net::UnixListener, runtime::Runtime};
use tonic::{Request, Response, Status, async_trait, codegen::tokio_stream::Stream};

/// A container, as it says.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    /// Its pod's uid.
    pub(crate) uid: String,
    pub(crate) name: String,
    pub(crate) cgroup: PathBuf,
    pub(crate) limit: Bytes,
    /// Labels of its pod.
    pub(crate) labels: BTreeMap<String, String>,
}

/// What it knows.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// The containers that run, by id.
    pub(crate) running: BTreeMap<String, Said>,
    /// What it was asked for: of whom, and which memory limit.
    pub(crate) updates: Vec<(String, i64)>,
}

/// The runtime; ends with its owner.
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    _tasks: Runtime,
}

impl Fake {
    /// One that listens at a socket.
    pub(crate) fn start(socket: &Path) -> Result<Self> {
        let tasks = Runtime::new()?;
        let state = Arc::<Mutex<State>>::default();
        if let Some(directory) = socket.parent() {
            fs::create_dir_all(directory)?;
        }
        let listener = {
            let _context = tasks.enter();
            UnixListener::bind(socket)?
        };
        let service = RuntimeServiceServer::new(Service(Arc::clone(&state)));
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = TowerToHyperService::new(service.clone());
                tokio::spawn(async move {
                    let connection = http2::Builder::new(TokioExecutor::new());
                    let served = connection.serve_connection(TokioIo::new(stream), service);
                    if let Err(error) = served.await {
                        tracing::debug!(%error, "a connection has ended");
                    }
                });
            }
        });
        Ok(Self {
            state,
            _tasks: tasks,
        })
    }

    /// What it knows, to look at and to change.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Service(Arc<Mutex<State>>);

impl Service {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn not_here<T>() -> Answer<T> {
    Err(Status::unimplemented("nobody asks a fake for that"))
}

fn resources(limit: Bytes) -> ContainerResources {
    ContainerResources {
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: limit.0.cast_signed(),
            ..LinuxContainerResources::default()
        }),
    }
}

#[async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        Ok(Response::new(VersionResponse {
            runtime_name: "fake".to_owned(),
            runtime_version: "1".to_owned(),
            ..VersionResponse::default()
        }))
    }

    async fn list_pod_sandbox(
        &self,
        _: Request<ListPodSandboxRequest>,
    ) -> Answer<ListPodSandboxResponse> {
        let state = self.state();
        let items = state.running.values().map(|said| PodSandbox {
            id: said.uid.clone(),
            metadata: Some(PodSandboxMetadata {
                name: said.name.clone(),
                uid: said.uid.clone(),
                namespace: "dev".to_owned(),
                attempt: 0,
            }),
            labels: said.labels.clone(),
            ..PodSandbox::default()
        });
        Ok(Response::new(ListPodSandboxResponse {
            items: items.collect(),
        }))
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Answer<ListContainersResponse> {
        let filter = request.into_inner().filter.and_then(|filter| filter.state);
        let running = ContainerState::ContainerRunning;
        let is_meant = filter.is_none_or(|filter| filter.state() == running);
        let state = self.state();
        let containers = state.running.iter().filter(|_| is_meant);
        let containers = containers.map(|(id, said)| Container {
            id: id.clone(),
            pod_sandbox_id: said.uid.clone(),
            metadata: Some(ContainerMetadata {
                name: said.name.clone(),
                attempt: 0,
            }),
            state: running.into(),
            ..Container::default()
        });
        Ok(Response::new(ListContainersResponse {
            containers: containers.collect(),
        }))
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Answer<ContainerStatusResponse> {
        let id = request.into_inner().container_id;
        let state = self.state();
        let Some(said) = state.running.get(&id) else {
            return Err(Status::not_found(id));
        };
        let status = ContainerStatus {
            id,
            state: ContainerState::ContainerRunning.into(),
            resources: Some(resources(said.limit)),
            ..ContainerStatus::default()
        };
        Ok(Response::new(ContainerStatusResponse {
            status: Some(status),
            ..ContainerStatusResponse::default()
        }))
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        let UpdateContainerResourcesRequest {
            container_id: id,
            linux,
            ..
        } = request.into_inner();
        let memory = linux.unwrap_or_default().memory_limit_in_bytes;
        let mut state = self.state();
        state.updates.push((id.clone(), memory));
        let Some(said) = state.running.get_mut(&id) else {
            return Err(Status::not_found(id));
        };
        if let Some(limit) = u64::try_from(memory).ok().filter(|&limit| limit > 0) {
            let limit = Bytes(limit);
            let set = Cgroup::open(&said.cgroup)
                .and_then(|cgroup| cgroup.set_limit("memory.max", Limit::At(limit)));
            set.map_err(|error| Status::internal(error.to_string()))?;
            said.limit = limit;
        }
        Ok(Response::new(UpdateContainerResourcesResponse {}))
    }

    type GetContainerEventsStream =
        Pin<Box<dyn Stream<Item = Result<ContainerEventResponse, Status>> + Send>>;

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        not_here()
    }

    async fn run_pod_sandbox(
        &self,
        _: Request<RunPodSandboxRequest>,
    ) -> Answer<RunPodSandboxResponse> {
        not_here()
    }

    async fn stop_pod_sandbox(
        &self,
        _: Request<StopPodSandboxRequest>,
    ) -> Answer<StopPodSandboxResponse> {
        not_here()
    }

    async fn remove_pod_sandbox(
        &self,
        _: Request<RemovePodSandboxRequest>,
    ) -> Answer<RemovePodSandboxResponse> {
        not_here()
    }

    async fn create_container(
        &self,
        _: Request<CreateContainerRequest>,
    ) -> Answer<CreateContainerResponse> {
        not_here()
    }

    async fn start_container(
        &self,
        _: Request<StartContainerRequest>,
    ) -> Answer<StartContainerResponse> {
        not_here()
    }

    async fn stop_container(
        &self,
        _: Request<StopContainerRequest>,
    ) -> Answer<StopContainerResponse> {
        not_here()
    }

    async fn remove_container(
        &self,
        _: Request<RemoveContainerRequest>,
    ) -> Answer<RemoveContainerResponse> {
        not_here()
    }

    async fn runtime_config(
        &self,
        _: Request<RuntimeConfigRequest>,
    ) -> Answer<RuntimeConfigResponse> {
        not_here()
    }
}
