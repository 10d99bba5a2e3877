{{- define "kvasir.operator" -}}
{{- printf "%s-operator" (.Release.Name | trunc 40 | trimSuffix "-") -}}
{{- end }}

{{- define "kvasir.image" -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end }}

{{- define "kvasir.selector" -}}
app.kubernetes.io/name: kvasir-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kvasir.labels" -}}
{{ include "kvasir.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* What the operator may do in a namespace: exactly what a reconcile calls. */}}
{{- define "kvasir.rules" -}}
- apiGroups: [kvasir.dev]
  resources: [modelservices]
  verbs: [get, list, watch]
- apiGroups: [kvasir.dev]
  resources: [prefillpools, decodepools, kvcachepools]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [kvasir.dev]
  resources: [modelservices/status, prefillpools/status, decodepools/status, kvcachepools/status]
  verbs: [patch]
- apiGroups: [kvasir.dev]
  # Owner references with OwnerReferencesPermissionEnforcement (OpenShift).
  resources:
  - modelservices/finalizers
  - prefillpools/finalizers
  - decodepools/finalizers
  - kvcachepools/finalizers
  verbs: [update]
- apiGroups: [apps]
  resources: [deployments, replicasets, statefulsets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [autoscaling]
  # Who else sets the number of a pool's workers.
  resources: [horizontalpodautoscalers]
  verbs: [list, watch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [inference.networking.k8s.io]
  # Of services with spec.gateway, where the cluster has these kinds.
  resources: [inferencepools]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  # patch: the mark that a drain began; delete: a drained worker that is wanted again.
  resources: [pods]
  verbs: [get, list, watch, patch, delete]
- apiGroups: [""]
  # The certificate of a service's parts: made, renewed, and shown by the operator itself.
  resources: [secrets]
  verbs: [get, create, patch]
- apiGroups: [""]
  # Whether the volume of a model is there.
  resources: [persistentvolumeclaims]
  verbs: [get]
- apiGroups: [""]
  # Why a pod does not start (a volume that cannot be mounted) is only told in events.
  resources: [events]
  verbs: [list, watch, create]
{{- end }}

{{/* A number as Prometheus' clients write the bound of a bucket: 1.0, 2.5. */}}
{{- define "kvasir.bucket" -}}
{{- if contains "." (toString .) }}{{ . }}{{ else }}{{ printf "%v.0" . }}{{ end -}}
{{- end }}

{{/* Pod Security "restricted", on pods and containers. */}}
{{- define "kvasir.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "kvasir.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "kvasir.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end }}
